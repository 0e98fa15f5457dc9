//! Images through the real control socket, and between hosts through real TLS.

mod hosts;

use hosts::{Authority, Host, kind, pattern};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use storage::ErrorKind;
use storage::control::ImageKind;

fn read(descriptor: std::os::fd::OwnedFd) -> Vec<u8> {
    let mut bytes = Vec::new();
    File::from(descriptor).read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn an_import_has_the_hashes_that_glance_promises() {
    let host = Host::start(&Authority::new(), 1);
    let image = host.import(b"abc").unwrap();
    assert_eq!(image.md5, "900150983cd24fb0d6963f7d28e17f72");
    assert_eq!(image.sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_eq!(
        image.sha512,
        "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
         2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f"
    );
    assert_eq!((image.size_bytes, image.virtual_size_bytes, image.kind), (3, 3, ImageKind::Disk));
    let disk = host.client().read_image(&image.sha512).unwrap();
    assert_eq!(disk.size_bytes, 3);
    let descriptor = File::from(disk.descriptor.try_clone().unwrap());
    assert!(descriptor.write_at(b"x", 0).is_err(), "the descriptor is read-only");
    assert_eq!(read(disk.descriptor), b"abc");
}

#[test]
fn an_image_is_held_after_a_restart_until_it_is_deleted() {
    let mut host = Host::start(&Authority::new(), 1);
    let image = host.import(&pattern(3 << 20)).unwrap();
    assert_eq!(host.import(&pattern(3 << 20)).unwrap(), image);
    host.restart();
    assert_eq!(host.client().status().unwrap().images, std::slice::from_ref(&image));
    host.client().delete_image(&image.sha512).unwrap();
    host.client().delete_image(&image.sha512).unwrap();
    assert!(!host.client().has_image(&image.sha512).unwrap());
    assert_eq!(kind(host.client().read_image(&image.sha512)), ErrorKind::NotFound);
    assert_eq!((host.entries("images"), host.entries("staging")), (0, 0));
}

#[test]
fn a_refused_import_leaves_nothing() {
    let host = Host::start(&Authority::new(), 1);
    let (reader, _) = std::io::pipe().unwrap();
    let mut client = host.client();
    assert_eq!(kind(client.import_image("i", "qcow2", 1 << 30, &reader)), ErrorKind::Invalid);
    assert_eq!(kind(client.import_image("../i", "raw", 1 << 30, &reader)), ErrorKind::Invalid);
    assert_eq!(kind(host.import(b"QFI\xfb pretends to be raw")), ErrorKind::Invalid);
    let (reader, mut writer) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut writer, b"12345").unwrap();
    drop(writer);
    assert_eq!(kind(client.import_image("i", "raw", 4, &reader)), ErrorKind::Invalid);
    assert_eq!((host.entries("images"), host.entries("staging")), (0, 0));
}

#[test]
fn another_host_fetches_an_image_and_verifies_it() {
    let authority = Authority::new();
    let (source, target) = (Host::start(&authority, 1), Host::start(&authority, 2));
    let content = pattern((13 << 20) + 777);
    let image = source.import(&content).unwrap();
    let fetch =
        || target.client().fetch_image(&image.sha512, image.size_bytes, vec![source.peer()]);
    std::thread::scope(|scope| {
        let both = [scope.spawn(fetch), scope.spawn(fetch)];
        both.into_iter().for_each(|one| one.join().unwrap().unwrap());
    });
    assert_eq!(target.client().status().unwrap().images, std::slice::from_ref(&image));
    let disk = target.client().read_image(&image.sha512).unwrap();
    assert!(read(disk.descriptor) == content);
}

#[test]
fn a_corrupted_source_gives_hash_mismatch_and_the_next_one_serves() {
    let authority = Authority::new();
    let [bad, good, target] = [1, 2, 3].map(|id| Host::start(&authority, id));
    let content = pattern(2 << 20);
    let image = bad.import(&content).unwrap();
    good.import(&content).unwrap();
    let path = bad.directory().join("images").join(&image.sha512).join("content");
    File::options().write(true).open(path).unwrap().write_all_at(b"rot", 1 << 20).unwrap();
    let mut client = target.client();
    let fetched = client.fetch_image(&image.sha512, image.size_bytes, vec![bad.peer()]);
    assert_eq!(kind(fetched), ErrorKind::HashMismatch);
    assert!(!client.has_image(&image.sha512).unwrap());
    assert_eq!((target.entries("images"), target.entries("staging")), (0, 0));
    client.fetch_image(&image.sha512, image.size_bytes, vec![bad.peer(), good.peer()]).unwrap();
    assert!(client.has_image(&image.sha512).unwrap());
}

#[test]
fn a_fetch_says_why_no_host_gave_the_image() {
    let authority = Authority::new();
    let (source, target) = (Host::start(&authority, 1), Host::start(&authority, 2));
    let sha512 = "0".repeat(128);
    let mut client = target.client();
    assert_eq!(kind(client.fetch_image(&sha512, 1, vec![])), ErrorKind::NotFound);
    assert_eq!(kind(client.fetch_image(&sha512, 1, vec![source.peer()])), ErrorKind::NotFound);
    assert_eq!(kind(client.fetch_image("../../x", 1, vec![source.peer()])), ErrorKind::Invalid);
    let mut misnamed = source.peer();
    misnamed.server_name = target.peer().server_name;
    assert_eq!(kind(client.fetch_image(&sha512, 1, vec![misnamed])), ErrorKind::Unreachable);
}

#[test]
fn a_host_of_another_authority_or_cluster_gets_nothing() {
    let authority = Authority::new();
    let source = Host::start(&authority, 1);
    let image = source.import(b"secret").unwrap();
    let strangers = [
        Host::start(&Authority::new(), 2),
        Host::start_as(&authority, "node-2.fedcba9876543210.trine".to_owned()),
        Host::start_as(&authority, "api.trine".to_owned()),
    ];
    for stranger in strangers {
        let fetched = stranger.client().fetch_image(&image.sha512, 6, vec![source.peer()]);
        assert_eq!(kind(fetched), ErrorKind::Unreachable);
    }
}

#[test]
fn a_full_disk_gives_no_space_and_nothing_half_made() {
    let mut host = Host::start(&Authority::new(), 1);
    host.stop();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=4m", "storage"])
        .arg(host.directory())
        .output();
    // Needs privilege: without it nothing can be shown here.
    if !mounted.is_ok_and(|output| output.status.success()) {
        return;
    }
    host.restart();
    let refused = host.import(&pattern(8 << 20));
    let left = (host.entries("images"), host.entries("staging"));
    let taken = host.import(&pattern(1 << 20));
    let grown = host.client().create_volume("v", 1 << 30);
    host.stop();
    let unmounted = std::process::Command::new("umount").arg(host.directory()).status().unwrap();
    assert!(unmounted.success());
    assert_eq!(kind(refused), ErrorKind::NoSpace);
    assert_eq!(left, (0, 0));
    taken.unwrap();
    grown.unwrap();
}
