//! Every kind of thread of a real guest's process makes all the system calls of its list, and no
//! other one: the list is as short as it can be, and what is not on it ends the guest.

mod scripted;
mod traced;

use abi::packet_ring::{Direction, Region};
use rustix::process::Signal;
use scripted::Script;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};
use traced::{Call, Swap, Tracing};
use vmm::config::VmConfig;
use vmm::control::{Client, ExitRecord};
use vmm::devices::DeviceKind;
use vmm::devices::blk::ring::Ring;
use vmm::devices::vsock::connector::{self, Outside};
use vmm::devices::vsock::packet::{
    HEADER_BYTES, HOST_CID, Header, Operation, SHUTDOWN_SEND, STREAM,
};
use vmm::process::seccomp::Role;
use vmm::process::seccomp::lists::RARE;
use vmm::spawner;

const DEADLINE: Duration = Duration::from_secs(60);
const SIZE_BYTES: u64 = 1 << 20;

/// A host with a spawner that may be traced; `None`: not here.
fn spawner() -> Option<spawner::Client> {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("SKIPPED: no /dev/kvm");
        return None;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root may trace a process that is closed");
        return None;
    }
    Some(spawner::Client::start(Path::new(env!("CARGO_BIN_EXE_trine-vmm"))).unwrap())
}

/// A guest with a device of each kind, a console and a control socket.
struct Guest {
    directory: tempfile::TempDir,
    record: File,
    switch: Region,
    /// `None`: it ended while it started.
    running: Option<spawner::Spawned>,
}

impl Guest {
    fn start(spawner: &spawner::Client, image: &[u8]) -> Guest {
        let directory = tempfile::tempdir().unwrap();
        let control = UnixListener::bind(directory.path().join("c")).unwrap();
        let (kernel, record, console) = (file(0), file(0), file(0));
        kernel.write_all_at(image, 0).unwrap();
        let (nbd, server) = UnixStream::pair().unwrap();
        std::thread::spawn(move || serve_nbd(server));
        let switch = Region::create().unwrap();
        let config: VmConfig = serde_json::from_value(serde_json::json!({
            "version": 1, "id": "guest", "nonce": "nonce", "memory_mib": 16,
            "boot": {"kernel": {"descriptor": 0}},
            "control": {"descriptor": 1},
            "exit_record": {"descriptor": 2},
            "console": {"file": {"descriptor": 3}},
            "disks": [
                {"id": "raw", "source": {"raw": {"descriptor": 4}}, "serial": "s",
                    "engine": "thread"},
                {"id": "remote", "source": {"nbd":
                    {"socket": {"descriptor": 5}, "size_bytes": SIZE_BYTES}}},
                {"id": "ring", "source": {"raw": {"descriptor": 11}}},
            ],
            "nets": [
                {"id": "eth0", "mac": "fa:16:3e:00:00:01", "backend": {"ring": [6, 7, 8]}},
            ],
            "rng": {"bytes_per_second": 1000},
            "balloon": {"free_page_reporting": false},
            "vsock": {"cid": CID, "socket": {"descriptor": 9}, "connector": 10},
        }))
        .unwrap();
        let (disk, ring_disk) = (file(SIZE_BYTES), file(SIZE_BYTES));
        let rings = switch.descriptors().unwrap();
        let nbd = OwnedFd::from(nbd);
        let control = OwnedFd::from(control);
        let mut descriptors =
            vec![kernel.as_fd(), control.as_fd(), record.as_fd(), console.as_fd()];
        descriptors.extend([disk.as_fd(), nbd.as_fd()]);
        descriptors.extend(rings.iter().map(AsFd::as_fd));
        let (inside, outside) = connector::pair().unwrap();
        let vsock = directory.path().join("vsock");
        let listener = UnixListener::bind(&vsock).unwrap();
        serve_guests_connection(&vsock);
        std::thread::spawn(move || Outside::new(outside, &vsock).serve());
        descriptors.extend([listener.as_fd(), inside.as_fd(), ring_disk.as_fd()]);
        let running = spawner.spawn(&config, &descriptors).ok();
        Guest { directory, record, switch, running }
    }

    fn control(&self) -> Client {
        Client::connect(&self.directory.path().join("c")).unwrap()
    }

    /// Waits until it has ended, and returns its record.
    fn end(self) -> ExitRecord {
        if let Some(running) = &self.running {
            let mut set =
                [rustix::event::PollFd::new(&running.pidfd, rustix::event::PollFlags::IN)];
            let timeout = rustix::event::Timespec { tv_sec: DEADLINE.as_secs() as i64, tv_nsec: 0 };
            assert_eq!(rustix::event::poll(&mut set, Some(&timeout)).unwrap(), 1, "it ends");
        }
        let mut json = vec![0; 8192];
        let len = self.record.read_at(&mut json, 0).unwrap();
        serde_json::from_slice(&json[..len]).unwrap_or_else(|error| panic!("no record: {error}"))
    }
}

impl Drop for Guest {
    /// A test that fails leaves no guest behind.
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            let _ = rustix::process::pidfd_send_signal(&running.pidfd, Signal::KILL);
        }
    }
}

fn file(size: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    file
}

fn serve_nbd(mut socket: UnixStream) {
    let mut head = [0; 28];
    while socket.read_exact(&mut head).is_ok() {
        let len = u32::from_be_bytes([head[24], head[25], head[26], head[27]]) as usize;
        let mut reply = [&0x6744_6698u32.to_be_bytes()[..], &[0; 4], &head[8..16]].concat();
        let mut data = vec![0; len];
        match head[7] {
            0 => reply.extend(data),
            1 => socket.read_exact(&mut data).unwrap(),
            _ => {}
        }
        socket.write_all(&reply).unwrap();
    }
}

/// Answers what the guest sends to [`PORT`], and then asks for a port of the guest's.
fn serve_guests_connection(vsock: &Path) {
    let listener = UnixListener::bind(format!("{}_{PORT}", vsock.display())).unwrap();
    let vsock = vsock.to_path_buf();
    std::thread::spawn(move || {
        let mut connection = listener.accept().unwrap().0;
        let mut word = [0; 4];
        connection.read_exact(&mut word).unwrap();
        connection.write_all(&word).unwrap();
        let mut asking = UnixStream::connect(vsock).unwrap();
        asking.write_all(b"CONNECT 9\n").unwrap();
        // Both stay until the guest has ended them.
        let _ = (connection.read(&mut word), asking.read(&mut word));
    });
}

const CID: u32 = 7;
const PORT: u32 = 6;
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// Uses everything that a guest can use; then waits for a disk and a network device to be plugged,
/// uses them and lets go of them.
fn busy_guest() -> Script {
    let mut script = Script::default();
    script.print("busy\n");
    let requests: &[(u64, &[(u32, u32)])] = &[
        (
            1,
            &[
                (WRITE, 4096),
                (READ, 4096),
                (FLUSH, 0),
                (GET_ID, 20),
                (DISCARD, 16),
                (WRITE_ZEROES, 16),
            ],
        ),
        (2, &[(WRITE, 4096), (READ, 4096), (FLUSH, 0)]),
        (3, &[(WRITE, 4096), (READ, 4096), (FLUSH, 0)]),
    ];
    for (slot, requests) in requests {
        script.start(*slot, 1);
        // For discards: one sector, the second one.
        script.store64(scripted::data(*slot), 1);
        script.store64(scripted::data(*slot) + 8, 1);
        for ((kind, len), count) in requests.iter().zip(1..) {
            if *kind >= DISCARD {
                script.store64(scripted::data(*slot), 1);
                script.store64(scripted::data(*slot) + 8, 1);
            }
            script.block(*slot, *kind, 0, *len);
            script.offer(*slot, 0, count);
            script.used(*slot, 0, count);
        }
    }
    use_net(&mut script, 4);
    script.print("net\n");
    use_memory_devices(&mut script);
    script.print("memory\n");
    use_vsock(&mut script, 7);
    script.print("vsock\n");
    script.reset(1);
    script.wait_for_plug();
    script.print("plug\n");
    script.start(8, 1);
    script.block(8, READ, 0, 512);
    script.offer(8, 0, 1);
    script.used(8, 0, 1);
    script.let_go();
    script.wait_for_plug();
    use_net(&mut script, 8);
    script.let_go();
    (5..=7).for_each(|slot| script.reset(slot));
    // A disk that it does not let go of.
    script.wait_for_plug();
    script.start(8, 1);
    script.block(8, READ, 0, 512);
    script.offer(8, 0, 1);
    script.used(8, 0, 1);
    // It ends only when what it let go of is gone and one more thing comes.
    script.wait_for_plug();
    script
}

/// Takes random numbers, more than there are in a second; gives a page to the host.
fn use_memory_devices(script: &mut Script) {
    script.start(5, 1);
    script.chain(5, 0, &[(scripted::data(5), 1500, true)]);
    script.offer(5, 0, 1);
    script.used(5, 0, 1);
    script.offer(5, 0, 2);
    script.used(5, 0, 2);
    script.start(6, 2);
    script.store32(scripted::data(6), 0x400);
    script.chain(6, 0, &[(scripted::data(6), 4, false)]);
    script.offer(6, 0, 1);
    script.used(6, 0, 1);
}

/// Connects to [`PORT`], says a word and hears it, is asked for a connection, and hangs up.
fn use_vsock(script: &mut Script, slot: u64) {
    const RECEIVE: u64 = 0;
    const TRANSMIT: u64 = 1;
    let (outgoing, incoming) = (scripted::data(slot), scripted::data(slot) + 0x2000);
    script.start(slot, 3);
    script.chain(slot, RECEIVE, &[(incoming, 4096, true)]);
    let say = |script: &mut Script, operation, flags, len: u32, count| {
        let header = Header {
            from_cid: CID.into(),
            to_cid: HOST_CID,
            from_port: 5,
            to_port: PORT,
            len,
            kind: STREAM,
            operation: Some(operation),
            flags,
            buffer_bytes: 1 << 20,
            forwarded: 0,
        };
        for (at, word) in (outgoing..).step_by(4).zip(header.bytes().chunks_exact(4)) {
            script.store32(at, u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
        }
        script.chain(slot, TRANSMIT, &[(outgoing, HEADER_BYTES as u32 + len, false)]);
        script.offer(slot, TRANSMIT, count);
        script.used(slot, TRANSMIT, count);
    };
    let hear = |script: &mut Script, count| {
        script.offer(slot, RECEIVE, count);
        script.used(slot, RECEIVE, count);
    };
    say(script, Operation::Request, 0, 0, 1);
    hear(script, 1);
    say(script, Operation::Data, 0, 4, 2);
    hear(script, 2);
    hear(script, 3);
    say(script, Operation::Shutdown, SHUTDOWN_SEND, 0, 3);
}

/// Sends a frame and receives one.
fn use_net(script: &mut Script, slot: u64) {
    script.start(slot, 2);
    script.chain(slot, 1, &[(scripted::data(slot), 72, false)]);
    script.offer(slot, 1, 1);
    script.used(slot, 1, 1);
    script.chain(slot, 0, &[(scripted::data(slot), 2048, true)]);
    script.offer(slot, 0, 1);
    script.used(slot, 0, 1);
}

/// Answers the guest's frame with another one, which the guest waits for.
fn answer_frame(switch: &Region) {
    let mut from_guest = switch.consumer(Direction::FromGuest).unwrap();
    let mut frame = [0; 4096];
    until("a frame of the guest's", || from_guest.pop(&mut frame).unwrap().is_some());
    let mut to_guest = switch.producer(Direction::ToGuest).unwrap();
    to_guest.push(&[5; 100]).unwrap();
    to_guest.publish().unwrap();
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "{what} did not happen");
        std::thread::yield_now();
    }
}

/// Every request of a control socket, the guest doing its part.
fn ask_everything(guest: &Guest) {
    answer_frame(&guest.switch);
    // A connection that ends, and its thread with it.
    guest.control().status().unwrap();
    let control = guest.control();
    control.status().unwrap();
    control.pause().unwrap();
    control.resume().unwrap();
    control.net_ring("eth0").unwrap();
    let (nbd, server) = UnixStream::pair().unwrap();
    std::thread::spawn(move || serve_nbd(server));
    control.replace_disk("remote", nbd.as_fd(), 0).unwrap();

    control.set_disk_limits("remote", Default::default()).unwrap();
    control.set_net_limits("eth0", Default::default(), Default::default()).unwrap();
    control.set_balloon(1).unwrap();
    control.balloon().unwrap();

    let add_disk = |id: &str| {
        let disk = serde_json::json!({"id": id, "source": {"raw": {"descriptor": 0}}});
        control.add_disk(serde_json::from_value(disk).unwrap(), &[file(4096).as_fd()])
    };
    add_disk("hot").unwrap();
    control.remove_disk("hot").unwrap();

    let switch = Region::create().unwrap();
    let net: vmm::config::NetConfig = serde_json::from_value(serde_json::json!(
        {"id": "hotnet", "mac": "fa:16:3e:00:00:02", "backend": {"ring": [0, 1, 2]}}
    ))
    .unwrap();
    let rings = switch.descriptors().unwrap();
    control.add_net(net, &rings.each_ref().map(AsFd::as_fd)).unwrap();
    answer_frame(&switch);
    control.remove_net("hotnet").unwrap();
    add_disk("pulled").unwrap();
    until("the guest reads the disk that is pulled out", || {
        let devices = control.metrics().unwrap().devices;
        devices.iter().any(|device| device.id == "pulled" && device.counts.reads == 1)
    });
    control.force_remove("pulled").unwrap();
    // The guest may have ended before the answer is out.
    let _ = add_disk("last");
}

/// An ELF with a PVH entry, as a Linux kernel has it, whose first instruction is undefined.
fn pvh_image() -> Vec<u8> {
    const START: u64 = 0x10_0000;
    const HEADERS: u64 = 64 + 2 * 56;
    const NOTE_BYTES: u64 = 20;
    const PVH_ENTRY: u32 = 18;
    let entry = START + HEADERS + NOTE_BYTES;
    let size = HEADERS + NOTE_BYTES + 2;
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    image.extend(entry.to_le_bytes());
    image.extend(64u64.to_le_bytes());
    image.extend([0; 12]);
    image.extend([64u16, 56, 2, 0, 0, 0].into_iter().flat_map(u16::to_le_bytes));
    let mut part = |kind: u32, offset: u64, size: u64| {
        image.extend([kind, 7].into_iter().flat_map(u32::to_le_bytes));
        let words = [offset, START + offset, START + offset, size, size, 4];
        image.extend(words.into_iter().flat_map(u64::to_le_bytes));
    };
    part(1, 0, size);
    part(4, HEADERS, NOTE_BYTES);
    image.extend([4, 4, PVH_ENTRY].into_iter().flat_map(u32::to_le_bytes));
    image.extend(b"Xen\0");
    image.extend((entry as u32).to_le_bytes());
    image.extend([0x0F, 0x0B]);
    image
}

/// What a role may call, as a tracer sees it.
fn allowed(role: Role) -> BTreeSet<Call> {
    let list = role.allowed();
    let with = |call, arguments: &[u32]| -> Vec<Call> {
        arguments.iter().map(|argument| (call, Some(*argument))).collect()
    };
    list.calls
        .iter()
        .map(|call| (*call, None))
        .chain(with(libc::SYS_ioctl, &list.ioctls))
        .chain(with(libc::SYS_fcntl, &list.fcntls))
        .chain(with(libc::SYS_prctl, &list.prctls))
        .collect()
}

#[test]
fn no_kind_of_thread_is_allowed_a_call_that_it_does_not_make() {
    let Some(spawner) = spawner() else { return };
    let tracing = Tracing::start(spawner.pid(), None);
    let guest = Guest::start(&spawner, &busy_guest().image(7));
    if guest.running.is_some() {
        ask_everything(&guest);
    }
    let record = guest.end();
    assert_eq!((record.reason.as_str(), record.code), ("power_off", Some(7)), "{record:?}");
    // One that crashes, one that boots as Linux does, and one that is killed.
    let guest = Guest::start(&spawner, &vmm::probe::crashing_image());
    assert_eq!(guest.end().reason, "crash");
    let guest = Guest::start(&spawner, &pvh_image());
    assert_eq!(guest.end().reason, "crash");
    let guest = Guest::start(&spawner, &vmm::probe::spinning_image());
    guest.control().kill().unwrap();
    assert_eq!(guest.end().reason, "killed");
    let used = tracing.finish();

    let no_rings = Ring::new(&file(4096)).is_err();
    let mut wrong = Vec::new();
    for role in Role::ALL {
        let name = role.thread_name();
        let used = used.get(name).unwrap_or_else(|| panic!("no {name} thread ran"));
        let allowed = allowed(role);
        let rare = |call: &Call| {
            RARE.iter().any(|(rare, _)| *rare == call.0)
                || no_rings && call.0 == libc::SYS_io_uring_enter
        };
        let unused = allowed.difference(used).filter(|call| !rare(call));
        wrong.extend(unused.map(|call| format!("{name}: {call:x?} is allowed and never made")));
        let more = used.difference(&allowed);
        wrong.extend(more.map(|call| format!("{name}: {call:x?} was made and is not allowed")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_forbidden_call_of_any_thread_ends_that_guest_and_its_record_says_which() {
    let Some(spawner) = spawner() else { return };
    let bystander = Guest::start(&spawner, &vmm::probe::spinning_image());
    for role in Role::ALL {
        for call in [libc::SYS_openat, libc::SYS_socket, libc::SYS_execve] {
            let swap = Swap { thread: role.thread_name(), call };
            let tracing = Tracing::start(spawner.pid(), Some(swap));
            let guest = Guest::start(&spawner, &busy_guest().image(7));
            if matches!(role, Role::Device(it) if it != DeviceKind::Disk && it != DeviceKind::Net) {
                answer_frame(&guest.switch);
            }
            // A control thread waits for connections: it makes its next call when one comes.
            let connection = UnixStream::connect(guest.directory.path().join("c"));
            let record = guest.end();
            drop((connection, tracing.finish()));
            assert_eq!((record.reason.as_str(), record.code), ("error", None));
            let name = role.thread_name();
            let expected =
                format!("system call {call:05} is not allowed in the sandbox to its {name} thread");
            assert_eq!(record.message, expected);
        }
    }
    bystander.control().status().unwrap();
    bystander.control().kill().unwrap();
    assert_eq!(bystander.end().reason, "killed");
}
