//! The gate of volumes, on one host and between two, through real sockets and real TLS.

mod hosts;

use hosts::{
    Authority, FUA, Host, Nbd, READ, TRIM, WRITE, WRITE_ZEROES, attachment, kind, pattern,
};
use std::fs::File;
use std::os::unix::fs::FileExt;
use storage::ErrorKind;
use storage::control::{Access, Attachment};

const SIZE: u64 = 64 << 20;

fn connect(home: &Host, remote: &Host, attachment: &Attachment) -> Nbd {
    home.client().export_volume(attachment.clone()).unwrap();
    let disk = remote.client().connect_volume(attachment.clone(), SIZE, home.peer()).unwrap();
    assert_eq!(disk.size_bytes, SIZE);
    Nbd::new(disk.descriptor)
}

#[test]
fn making_and_deleting_a_volume_can_be_repeated() {
    let mut host = Host::start(&Authority::new(), 1);
    let mut client = host.client();
    client.create_volume("v", SIZE).unwrap();
    client.create_volume("v", SIZE).unwrap();
    assert_eq!(kind(client.create_volume("v", SIZE * 2)), ErrorKind::Exists);
    for (id, size) in [("w", 0), ("w", 513), ("w", u64::MAX - 511), ("a/b", 512), ("", 512)] {
        assert_eq!(kind(client.create_volume(id, size)), ErrorKind::Invalid, "{id} {size}");
    }
    host.restart();
    let mut client = host.client();
    let volumes = client.list_volumes().unwrap();
    assert_eq!((volumes.len(), volumes[0].size_bytes, volumes[0].generation), (1, SIZE, 0));
    client.delete_volume("v", None).unwrap();
    client.delete_volume("v", None).unwrap();
    assert_eq!((host.entries("volumes"), host.entries("staging")), (0, 0));
    assert_eq!(kind(client.attach_volume(attachment("v", "a", 1))), ErrorKind::NotFound);
}

#[test]
fn one_server_holds_a_volume_at_a_time() {
    let host = Host::start(&Authority::new(), 1);
    let mut client = host.client();
    client.create_volume("v", SIZE).unwrap();
    let disk = client.attach_volume(attachment("v", "a", 5)).unwrap();
    File::from(disk.descriptor).write_all_at(b"mine", 0).unwrap();
    client.attach_volume(attachment("v", "a", 5)).unwrap();
    assert_eq!(kind(client.attach_volume(attachment("v", "b", 5))), ErrorKind::InUse);
    assert_eq!(kind(client.export_volume(attachment("v", "b", 5))), ErrorKind::InUse);
    assert_eq!(kind(client.attach_volume(attachment("v", "b", 4))), ErrorKind::Stale);
    assert_eq!(kind(client.delete_volume("v", None)), ErrorKind::InUse);
    client.detach_volume("v", "b", 5).unwrap();
    assert!(client.list_volumes().unwrap()[0].attached.is_some(), "b held nothing to end");
    client.detach_volume("v", "a", 5).unwrap();
    assert_eq!(kind(client.attach_volume(attachment("v", "b", 4))), ErrorKind::Stale);
    let disk = client.attach_volume(attachment("v", "b", 6)).unwrap();
    let mut found = [0; 4];
    File::from(disk.descriptor).read_exact_at(&mut found, 0).unwrap();
    assert_eq!(&found, b"mine");
}

#[test]
fn a_raw_descriptor_that_is_still_open_keeps_every_other_server_out() {
    let mut host = Host::start(&Authority::new(), 1);
    host.client().create_volume("v", SIZE).unwrap();
    let guests = host.client().attach_volume(attachment("v", "a", 1)).unwrap().descriptor;
    host.client().detach_volume("v", "a", 1).unwrap();
    assert_eq!(kind(host.client().attach_volume(attachment("v", "b", 2))), ErrorKind::InUse);
    // Not even a restart forgets it: the kernel knows.
    host.restart();
    assert_eq!(kind(host.client().export_volume(attachment("v", "b", 2))), ErrorKind::InUse);
    assert_eq!(host.client().list_volumes().unwrap()[0].generation, 1);
    drop(guests);
    host.client().attach_volume(attachment("v", "b", 2)).unwrap();
}

#[test]
fn generation_and_holder_outlive_a_restart() {
    let mut host = Host::start(&Authority::new(), 1);
    host.client().create_volume("v", SIZE).unwrap();
    host.client().export_volume(attachment("v", "a", 7)).unwrap();
    host.restart();
    let volume = &host.client().list_volumes().unwrap()[0];
    let holder = volume.attached.as_ref().unwrap();
    assert_eq!((volume.generation, holder.server_id.as_str()), (7, "a"));
    assert_eq!((holder.access, holder.read_only), (Access::Export, false));
    assert_eq!(kind(host.client().attach_volume(attachment("v", "b", 6))), ErrorKind::Stale);
    assert_eq!(kind(host.client().attach_volume(attachment("v", "b", 7))), ErrorKind::InUse);
}

#[test]
fn what_one_host_wrote_another_reads_after_detach() {
    let authority = Authority::new();
    let [home, first, second] = [1, 2, 3].map(|id| Host::start(&authority, id));
    home.client().create_volume("v", SIZE).unwrap();
    let bytes = pattern(5 << 20);
    let one = attachment("v", "a", 1);
    let mut guest = connect(&home, &first, &one);
    assert!(home.client().list_volumes().unwrap()[0].connected);
    assert_eq!(first.client().status().unwrap().connected.len(), 1);
    guest.write(12345, &bytes);
    guest.flush();
    assert!(guest.read(12345, 5 << 20) == bytes);
    first.client().disconnect_volume("v", "a").unwrap();
    home.client().detach_volume("v", "a", 1).unwrap();
    assert!(guest.is_closed());
    assert_eq!(first.client().status().unwrap().connected, []);

    let mut guest = connect(&home, &second, &attachment("v", "b", 2));
    assert!(guest.read(12345, 5 << 20) == bytes);
    drop(guest);
    home.client().detach_volume("v", "b", 2).unwrap();
    let local = home.client().attach_volume(attachment("v", "c", 3)).unwrap();
    let mut found = vec![0; bytes.len()];
    File::from(local.descriptor).read_exact_at(&mut found, 12345).unwrap();
    assert!(found == bytes);
}

#[test]
fn a_newer_generation_cuts_an_older_connection_off() {
    let authority = Authority::new();
    let [home, first, second] = [1, 2, 3].map(|id| Host::start(&authority, id));
    home.client().create_volume("v", SIZE).unwrap();
    let old = attachment("v", "a", 1);
    let mut guest = connect(&home, &first, &old);
    guest.write(0, b"before");
    let mut next = connect(&home, &second, &attachment("v", "b", 2));
    assert!(guest.is_closed());
    assert_eq!(next.read(0, 6), b"before");
    let again = first.client().connect_volume(old.clone(), SIZE, home.peer());
    assert_eq!(kind(again), ErrorKind::Stale);
    assert_eq!(kind(home.client().export_volume(old)), ErrorKind::Stale);
    next.write(0, b"after!");
}

#[test]
fn only_the_holder_connects_and_an_unknown_volume_is_not_found() {
    let authority = Authority::new();
    let (home, remote) = (Host::start(&authority, 1), Host::start(&authority, 2));
    home.client().create_volume("v", SIZE).unwrap();
    let connect = |attachment, size| remote.client().connect_volume(attachment, size, home.peer());
    assert_eq!(kind(connect(attachment("v", "a", 1), SIZE)), ErrorKind::InUse);
    home.client().export_volume(attachment("v", "a", 1)).unwrap();
    assert_eq!(kind(connect(attachment("v", "b", 1), SIZE)), ErrorKind::InUse);
    assert_eq!(kind(connect(attachment("v", "a", 2), SIZE)), ErrorKind::InUse);
    assert_eq!(kind(connect(attachment("w", "a", 1), SIZE)), ErrorKind::NotFound);
    assert_eq!(kind(connect(attachment("v", "a", 1), SIZE * 2)), ErrorKind::Invalid);
    connect(attachment("v", "a", 1), SIZE).unwrap();
}

#[test]
fn a_second_connection_of_the_same_attachment_replaces_the_first() {
    let authority = Authority::new();
    let (home, remote) = (Host::start(&authority, 1), Host::start(&authority, 2));
    home.client().create_volume("v", SIZE).unwrap();
    let one = attachment("v", "a", 1);
    let mut lost = connect(&home, &remote, &one);
    lost.write(0, b"kept");
    let mut again = connect(&home, &remote, &one);
    assert!(lost.is_closed());
    assert_eq!(again.read(0, 4), b"kept");
}

#[test]
fn a_connection_answers_what_it_can_not_do_and_goes_on() {
    let authority = Authority::new();
    let (home, remote) = (Host::start(&authority, 1), Host::start(&authority, 2));
    home.client().create_volume("v", SIZE).unwrap();
    let mut guest = connect(&home, &remote, &attachment("v", "a", 1));
    assert_eq!(guest.call(READ, 0, SIZE, &[], 1), 22);
    assert_eq!(guest.call(READ, 0, 0, &[], (32 << 20) + 1), 22);
    assert_eq!(guest.call(WRITE, 0, SIZE - 1, b"xy", 2), 28);
    assert_eq!(guest.call(99, 0, 0, &[], 0), 22);
    assert_eq!(guest.call(WRITE, FUA, 4096, &pattern(8192), 8192), 0);
    assert_eq!(guest.call(WRITE_ZEROES, FUA, 4096, &[], 4096), 0);
    assert_eq!(guest.call(TRIM, 0, 1 << 20, &[], 1 << 20), 0);
    assert_eq!(guest.read(4096, 4096), [0; 4096]);
    assert!(guest.read(8192, 4096) == pattern(8192)[4096..]);
    drop(guest);
    home.client().detach_volume("v", "a", 1).unwrap();
    let read_only = Attachment { read_only: true, ..attachment("v", "b", 2) };
    let mut guest = connect(&home, &remote, &read_only);
    assert_eq!(guest.call(WRITE, 0, 0, b"no", 2), 1);
    assert!(guest.read(8192, 4096) == pattern(8192)[4096..]);
}

#[test]
fn many_requests_under_way_are_each_answered() {
    let authority = Authority::new();
    let (home, remote) = (Host::start(&authority, 1), Host::start(&authority, 2));
    home.client().create_volume("v", SIZE).unwrap();
    let mut guest = connect(&home, &remote, &attachment("v", "a", 1));
    let block = pattern(4096);
    let offsets: Vec<u64> = (0..500).map(|n| n * 4096).collect();
    for offset in &offsets {
        guest.send(WRITE, 0, *offset, 4096, &block);
    }
    let mut answered: Vec<u64> = offsets
        .iter()
        .map(|_| {
            let (error, cookie) = guest.reply().unwrap();
            assert_eq!(error, 0);
            cookie
        })
        .collect();
    answered.sort_unstable();
    assert_eq!(answered, offsets);
    assert!(guest.read(499 * 4096, 4096) == block);
}

#[test]
fn a_deletion_decided_at_a_newer_generation_wins_over_a_holder() {
    let authority = Authority::new();
    let (home, remote) = (Host::start(&authority, 1), Host::start(&authority, 2));
    home.client().create_volume("v", SIZE).unwrap();
    let mut guest = connect(&home, &remote, &attachment("v", "a", 4));
    assert_eq!(kind(home.client().delete_volume("v", Some(4))), ErrorKind::InUse);
    home.client().delete_volume("v", Some(5)).unwrap();
    assert!(guest.is_closed());
    assert_eq!(home.entries("volumes"), 0);
}

#[test]
fn an_export_is_for_one_host_named_or_first_and_that_outlives_a_restart() {
    let authority = Authority::new();
    let [mut home, first, second] = [1, 2, 3].map(|id| Host::start(&authority, id));
    home.client().create_volume("v", SIZE).unwrap();
    let one = attachment("v", "a", 1);
    let connect_from = |host: &Host, home: &Host, attachment: &Attachment| {
        host.client().connect_volume(attachment.clone(), SIZE, home.peer())
    };
    home.client().export_volume_to(one.clone(), &second.peer().server_name).unwrap();
    assert_eq!(kind(connect_from(&first, &home, &one)), ErrorKind::InUse);
    home.restart();
    assert_eq!(kind(connect_from(&first, &home, &one)), ErrorKind::InUse);
    connect_from(&second, &home, &one).unwrap();
    let moved = home.client().export_volume_to(one.clone(), &first.peer().server_name);
    assert_eq!(kind(moved), ErrorKind::InUse);
    // A grant that names nobody is for the first that comes; only a newer generation moves it.
    let two = attachment("v", "a", 2);
    home.client().export_volume(two.clone()).unwrap();
    connect_from(&first, &home, &two).unwrap();
    home.restart();
    home.client().export_volume(two.clone()).unwrap();
    assert_eq!(kind(connect_from(&second, &home, &two)), ErrorKind::InUse);
    home.client().export_volume(attachment("v", "a", 3)).unwrap();
    connect_from(&second, &home, &attachment("v", "a", 3)).unwrap();
}

#[test]
fn what_was_answered_before_the_homes_restart_is_covered_by_a_flush_after_it() {
    let authority = Authority::new();
    let (mut home, remote) = (Host::start(&authority, 1), Host::start(&authority, 2));
    home.client().create_volume("v", SIZE).unwrap();
    let one = attachment("v", "a", 1);
    let mut guest = connect(&home, &remote, &one);
    guest.write(4096, b"answered, not flushed");
    home.restart();
    assert!(guest.is_closed());
    // The grant is on disk: nobody has to export again before the guest's host reconnects.
    let disk = remote.client().connect_volume(one, SIZE, home.peer()).unwrap();
    let mut guest = Nbd::new(disk.descriptor);
    guest.flush();
    assert_eq!(guest.read(4096, 21), b"answered, not flushed");
}

#[test]
fn a_connection_tells_whether_the_homes_kernel_started_anew_meanwhile() {
    let authority = Authority::new();
    let (mut home, mut remote) = (Host::start(&authority, 1), Host::start(&authority, 2));
    home.client().create_volume("v", SIZE).unwrap();
    let one = attachment("v", "a", 1);
    home.client().export_volume(one.clone()).unwrap();
    let epoch = |home: &Host, remote: &Host| {
        remote.client().connect_volume(one.clone(), SIZE, home.peer()).unwrap().epoch
    };
    let first = epoch(&home, &remote);
    home.restart();
    remote.restart();
    assert_eq!(epoch(&home, &remote), first, "a restart of storage loses no page cache");
    home.stop();
    let stamp = home.directory().join("storage.json");
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let text = std::fs::read_to_string(&stamp).unwrap();
    std::fs::write(&stamp, text.replace(boot_id.trim(), "an earlier boot")).unwrap();
    home.restart();
    assert_eq!(epoch(&home, &remote), first + 1);
    home.restart();
    assert_eq!(epoch(&home, &remote), first + 1, "it is durable");
}

#[test]
fn a_damaged_volume_is_named_and_hides_no_other() {
    let mut host = Host::start(&Authority::new(), 1);
    for id in ["torn", "short", "well"] {
        host.client().create_volume(id, SIZE).unwrap();
    }
    let place = host.directory().join("volumes");
    let record = std::fs::read(place.join("torn/volume.json")).unwrap();
    std::fs::write(place.join("torn/volume.json"), &record[..record.len() / 2]).unwrap();
    let data = File::options().write(true).open(place.join("short/data")).unwrap();
    data.set_len(SIZE / 2).unwrap();
    host.restart();
    let mut client = host.client();
    let status = client.status().unwrap();
    let damaged: Vec<_> = status.volumes_damaged.iter().map(|volume| volume.id.as_str()).collect();
    assert_eq!(damaged, ["short", "torn"]);
    assert_eq!(status.volumes.len(), 1);
    client.attach_volume(attachment("well", "a", 1)).unwrap();
    let refused = client.attach_volume(attachment("torn", "a", 1)).unwrap_err();
    assert!(refused.kind == ErrorKind::Io && refused.message.contains("torn"), "{refused}");
    // Making it again would lose what a repair could save; deleting it is the operator's word.
    assert_eq!(kind(client.create_volume("torn", SIZE)), ErrorKind::Io);
    assert_eq!(std::fs::read(place.join("torn/volume.json")).unwrap().len(), record.len() / 2);
    client.delete_volume("torn", None).unwrap();
    client.create_volume("torn", SIZE).unwrap();
    client.delete_volume("short", None).unwrap();
    assert_eq!((host.entries("volumes"), host.entries("staging")), (2, 0));
}
