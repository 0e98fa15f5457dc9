//! A launch is a budget: what it costs in system calls, exits and memory is counted and bounded.
//! None of it depends on how busy the machine is.

use rustix::process::Signal;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use vmm::bench::{self, Devices, Image, Running, trace};
use vmm::config::Resource;
use vmm::probe;
use vmm::spawner::Client;

const EXECUTABLE: &str = env!("CARGO_BIN_EXE_trine-vmm");
const MEMORY_MIB: u32 = 128;
/// Most private memory of a guest's process beyond its guest's.
const VMM_BYTES_MAX: u64 = 2 << 20;

fn spawner() -> Option<Client> {
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        eprintln!("SKIPPED: no /dev/kvm");
        return None;
    }
    Some(Client::start(Path::new(EXECUTABLE)).unwrap())
}

fn file(bytes: &[u8]) -> File {
    use std::io::Write;
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// Launches the smallest guest, traced: its calls and its exits.
fn traced(spawner: &Client, devices: Devices) -> (trace::Calls, u32) {
    let kernel = file(&probe::image(false, 0));
    let image = Image { kernel: &kernel, cmdline: "", memory_mib: MEMORY_MIB };
    let (sample, calls) = trace::count(spawner, || bench::launch(spawner, image, devices)).unwrap();
    (calls, sample.exits)
}

#[test]
fn a_launch_keeps_to_its_budget_of_system_calls_and_exits() {
    let Some(spawner) = spawner() else { return };
    // Six of the disk's are its ring: made, mapped twice, its file, its restrictions, enabled.
    for (devices, calls_max) in [(Devices::None, 44), (Devices::BlockAndNet, 60)] {
        let (calls, exits) = traced(&spawner, devices);
        eprintln!("{devices:?}: {} calls, {exits} exits", calls.numbers.len());
        assert!(
            calls.numbers.len() <= calls_max,
            "{devices:?}: {} calls, {calls_max} are planned: {:?}",
            calls.numbers.len(),
            calls.by_number()
        );
        // What makes a VM is in what was counted.
        assert!(calls.by_number().get(&libc::SYS_ioctl).is_some_and(|ioctls| *ioctls >= 10));
        assert!(calls.by_number().contains_key(&libc::SYS_seccomp), "the sandbox was not closed");
        assert_eq!(exits, 1, "{devices:?}: only the mark itself leaves the guest");
    }
}

#[test]
fn two_launches_cost_the_same_calls() {
    let Some(spawner) = spawner() else { return };
    let (first, _) = traced(&spawner, Devices::None);
    let (second, _) = traced(&spawner, Devices::None);
    assert_eq!(first, second);
}

#[test]
fn a_control_socket_costs_one_thread_that_was_prepared() {
    let Some(spawner) = spawner() else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c");
    let control = UnixListener::bind(&path).unwrap();
    let kernel = file(&probe::spinning_image());
    let image = Image { kernel: &kernel, cmdline: "", memory_mib: MEMORY_MIB };
    let mut config = bench::config(image);
    config.control = Some(Resource::Descriptor(2));
    let record = file(b"");
    let launch = || {
        let descriptors = [kernel.as_fd(), record.as_fd(), control.as_fd()];
        let guest = spawner.spawn(&config, &descriptors)?;
        // Not over the socket: that would be served by one more thread.
        rustix::process::pidfd_send_signal(&guest.pidfd, Signal::KILL).unwrap();
        Ok(guest)
    };
    let (_, calls) = trace::count(&spawner, launch).unwrap();
    eprintln!("with a control socket: {} calls", calls.numbers.len());
    let counts = calls.by_number();
    let made = |call| counts.get(&call).copied().unwrap_or(0);
    assert_eq!(made(libc::SYS_clone3) + made(libc::SYS_clone), 1, "{counts:?}");
    // What the spawner did for all: the handlers of signals.
    assert_eq!(made(libc::SYS_rt_sigaction), 0, "{counts:?}");
    assert!(calls.numbers.len() <= 60, "{} calls: {counts:?}", calls.numbers.len());
}

#[test]
fn a_guest_costs_little_memory_beyond_its_own() {
    let Some(spawner) = spawner() else { return };
    let kernel = file(&probe::spinning_image());
    let image = Image { kernel: &kernel, cmdline: "", memory_mib: MEMORY_MIB };
    let guest = Running::start(&spawner, image, Devices::BlockAndNet).unwrap();
    let memory = match guest.memory() {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            eprintln!("SKIPPED: only root sees the memory of a closed process");
            return guest.kill().unwrap();
        }
        memory => memory.unwrap(),
    };
    assert!(!guest.has_ended().unwrap());
    guest.kill().unwrap();
    eprintln!("{memory:?}");
    assert!(memory.guest_bytes > 0 && memory.guest_bytes < 8 << 20, "{memory:?}");
    assert!(memory.vmm_bytes > 0 && memory.vmm_bytes <= VMM_BYTES_MAX, "{memory:?}");
}
