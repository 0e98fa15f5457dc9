//! Guests started by the real spawner, with the sandbox closed, and asked over their control socket.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use vmm::config::{Boot, DiskConfig, DiskSource, NetBackend, NetConfig, Resource, VmConfig};
use vmm::control::{self, ControlError, ExitRecord, RunState, Writes};
use vmm::probe;
use vmm::spawner::{Client, SpawnError, Spawned};

const EXECUTABLE: &str = env!("CARGO_BIN_EXE_trine-vmm");

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

/// A guest's descriptors, as a node would hold them.
struct Launch {
    directory: tempfile::TempDir,
    kernel: File,
    record: File,
    control: UnixListener,
}

impl Launch {
    fn new(image: &[u8]) -> Launch {
        let directory = tempfile::tempdir().unwrap();
        let control = UnixListener::bind(directory.path().join("c")).unwrap();
        Launch { kernel: file(image), record: file(b""), control, directory }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("c")
    }

    fn config(&self) -> VmConfig {
        VmConfig {
            version: 1,
            id: "guest".into(),
            nonce: "nonce".into(),
            vcpus: 1,
            memory_mib: 64,
            huge_pages: Default::default(),
            boot: Boot { kernel: Resource::Descriptor(0), initrd: None, cmdline: String::new() },
            console: None,
            disks: vec![],
            nets: vec![],
            rng: None,
            balloon: None,
            vsock: None,
            control: Some(Resource::Descriptor(1)),
            exit_record: Some(Resource::Descriptor(2)),
            lease: None,
            sandbox: Default::default(),
        }
    }

    fn spawn(
        &self,
        spawner: &Client,
        config: &VmConfig,
        more: &[OwnedFd],
    ) -> Result<Running, SpawnError> {
        let mut descriptors = vec![self.kernel.as_fd(), self.control.as_fd(), self.record.as_fd()];
        descriptors.extend(more.iter().map(AsFd::as_fd));
        spawner.spawn(config, &descriptors).map(Running)
    }

    fn record(&mut self) -> ExitRecord {
        let mut text = String::new();
        self.record.rewind().unwrap();
        self.record.read_to_string(&mut text).unwrap();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text:?}"))
    }
}

/// A guest that ends with its test, also where that fails.
#[derive(Debug)]
struct Running(Spawned);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
    }
}

impl std::ops::Deref for Running {
    type Target = Spawned;

    fn deref(&self) -> &Spawned {
        &self.0
    }
}

fn wait(guest: &Spawned) {
    let mut set = [rustix::event::PollFd::new(&guest.pidfd, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut set, None).unwrap();
}

#[test]
fn a_guest_runs_in_the_sandbox_and_leaves_its_record() {
    let Some(spawner) = spawner() else { return };
    let mut launch = Launch::new(&probe::image(true, 3));
    let guest = launch.spawn(&spawner, &launch.config(), &[]).unwrap();
    wait(&guest);
    let record = launch.record();
    assert_eq!((record.reason.as_str(), record.code), ("power_off", Some(3)), "{}", record.message);
    let times = record.timings;
    assert!(times.spawn_ns < times.process_ns && times.process_ns < times.run_ns, "{times:?}");
    assert!(
        times.run_ns <= times.first_exit_ns && times.first_exit_ns <= times.main_ns,
        "{times:?}"
    );
}

#[test]
fn a_running_guest_is_asked_paused_resumed_and_killed() {
    let Some(spawner) = spawner() else { return };
    let mut launch = Launch::new(&probe::spinning_image());
    let guest = launch.spawn(&spawner, &launch.config(), &[]).unwrap();
    let client = control::Client::connect(&launch.socket()).unwrap();
    let status = client.status().unwrap();
    assert_eq!(
        (status.id.as_str(), status.nonce.as_str(), status.pid),
        ("guest", "nonce", guest.pid)
    );
    assert_eq!(status.state, RunState::Running);
    client.pause().unwrap();
    assert_eq!(client.status().unwrap().state, RunState::Paused);
    client.resume().unwrap();
    client.pause().unwrap();
    client.kill().unwrap();
    wait(&guest);
    assert_eq!(launch.record().reason, "killed");
}

#[test]
fn guests_outlive_their_spawner() {
    let Some(spawner) = spawner() else { return };
    let launch = Launch::new(&probe::spinning_image());
    let guest = launch.spawn(&spawner, &launch.config(), &[]).unwrap();
    let pid = rustix::process::Pid::from_raw(spawner.pid() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    drop(spawner);
    let client = control::Client::connect(&launch.socket()).unwrap();
    assert_eq!(client.status().unwrap().pid, guest.pid);
    client.kill().unwrap();
    wait(&guest);
}

/// A line of a process's `/proc/PID/status`.
fn status_line(pid: u32, key: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {key} in {status}")).trim().to_string()
}

fn open_files(pid: u32) -> Vec<String> {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .map(|target| target.display().to_string())
        .filter(|target| target != "/dev/null")
        .collect()
}

#[test]
fn a_guests_process_is_closed() {
    let Some(spawner) = spawner() else { return };
    let launch = Launch::new(&probe::spinning_image());
    let mut config = launch.config();
    let root = rustix::process::geteuid().is_root();
    if root {
        config.sandbox.uid = Some(64_123);
    }
    let guest = launch.spawn(&spawner, &config, &[]).unwrap();
    assert_eq!(status_line(guest.pid, "NoNewPrivs"), "1");
    assert_eq!(status_line(guest.pid, "Seccomp"), "2");
    assert_eq!(u64::from_str_radix(&status_line(guest.pid, "CapEff"), 16).unwrap(), 0);
    assert_eq!(u64::from_str_radix(&status_line(guest.pid, "CapPrm"), 16).unwrap(), 0);
    if root {
        assert_eq!(
            status_line(guest.pid, "Uid").split_whitespace().collect::<Vec<_>>(),
            ["64123"; 4]
        );
        assert_eq!(
            status_line(guest.pid, "Gid").split_whitespace().collect::<Vec<_>>(),
            ["64123"; 4]
        );
        let namespace =
            |pid: &str, kind: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        for kind in ["mnt", "net", "ipc"] {
            assert_ne!(namespace(&guest.pid.to_string(), kind), namespace("self", kind), "{kind}");
        }
        // What it holds once its start is reported: standard streams, its VM and vCPU, its control
        // socket and exit record.
        let start = std::time::Instant::now();
        let mut open = open_files(guest.pid);
        while open.len() > 4 && start.elapsed().as_secs() < 20 {
            std::thread::yield_now();
            open = open_files(guest.pid);
        }
        assert_eq!(open.len(), 4, "{open:?}");
        assert!(open.iter().any(|target| target.contains("kvm-vm")), "{open:?}");
        assert!(!open.iter().any(|target| target.contains("/dev/kvm")), "{open:?}");
    }
    control::Client::connect(&launch.socket()).unwrap().kill().unwrap();
    wait(&guest);
}

#[test]
fn a_guest_enters_its_cgroup() {
    let Some(spawner) = spawner() else { return };
    let name = format!("trine-test-{}", std::process::id());
    let made = ["/sys/fs/cgroup", "/sys/fs/cgroup/pids"]
        .into_iter()
        .filter(|parent| Path::new(parent).join("cgroup.procs").exists())
        .map(|parent| Path::new(parent).join(&name))
        .find(|path| std::fs::create_dir(path).is_ok());
    let Some(cgroup) = made else {
        eprintln!("SKIPPED: no cgroup can be made here");
        return;
    };
    let launch = Launch::new(&probe::spinning_image());
    let mut config = launch.config();
    config.sandbox.cgroups.push(cgroup.clone());
    let guest = launch.spawn(&spawner, &config, &[]).unwrap();
    let entered = std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
    control::Client::connect(&launch.socket()).unwrap().kill().unwrap();
    wait(&guest);
    assert_eq!(entered.trim(), guest.pid.to_string());
    config.sandbox.cgroups = vec!["/sys/fs/cgroup/none".into()];
    let error = Launch::new(&probe::image(false, 0)).spawn(&spawner, &config, &[]).unwrap_err();
    assert!(error.to_string().contains("enter cgroup /sys/fs/cgroup/none"), "{error}");
    // The kernel takes the process out of its cgroup a moment after its pidfd is readable.
    let start = std::time::Instant::now();
    while std::fs::remove_dir(&cgroup).is_err() && start.elapsed().as_secs() < 20 {
        std::thread::yield_now();
    }
}

#[test]
fn several_guests_start_at_once() {
    let Some(spawner) = spawner() else { return };
    std::thread::scope(|scope| {
        for code in 0..8u8 {
            let spawner = &spawner;
            scope.spawn(move || {
                let mut launch = Launch::new(&probe::image(true, code));
                wait(&launch.spawn(spawner, &launch.config(), &[]).unwrap());
                assert_eq!(launch.record().code, Some(code));
            });
        }
    });
}

#[test]
fn disks_and_nets_are_plugged_into_a_running_guest() {
    let Some(spawner) = spawner() else { return };
    let launch = Launch::new(&probe::spinning_image());
    let ring = abi::packet_ring::Region::create().unwrap();
    let mut config = launch.config();
    config.disks.push(disk("cold", 3));
    config.nets.push(net("eth0", [4, 5, 6]));
    let mut more = vec![OwnedFd::from(file(&[7; 8192]))];
    more.extend(ring.descriptors().unwrap());
    let guest = launch.spawn(&spawner, &config, &more).unwrap();
    let client = control::Client::connect(&launch.socket()).unwrap();

    let hot = file(&[0; 4096]);
    client.add_disk(disk("hot", 0), &[hot.as_fd()]).unwrap();
    let again = client.add_disk(disk("hot", 0), &[hot.as_fd()]);
    assert!(matches!(again, Err(ControlError::Refused { kind, .. }) if kind == "exists"));
    let empty = file(&[]);
    let refused = client.add_disk(disk("empty", 0), &[empty.as_fd()]);
    assert!(matches!(refused, Err(ControlError::Refused { kind, .. }) if kind == "invalid"));
    assert!(
        client.remove_disk("nothing").is_err_and(|error| error.to_string().contains("nothing"))
    );
    let second = abi::packet_ring::Region::create().unwrap();
    let fds = second.descriptors().unwrap();
    client
        .add_net(net("eth1", [0, 1, 2]), &[fds[0].as_fd(), fds[1].as_fd(), fds[2].as_fd()])
        .unwrap();
    let [memory, from_guest, to_guest] = client.net_ring("eth0").unwrap();
    abi::packet_ring::Region::map(memory, from_guest, to_guest).unwrap();
    let status = client.status().unwrap();
    assert_eq!(status.disks, ["cold", "hot"]);
    assert_eq!(status.nets, ["eth0", "eth1"]);
    client.kill().unwrap();
    wait(&guest);
}

#[test]
fn a_guest_says_whether_its_hosts_lease_lets_it_write() {
    let Some(spawner) = spawner() else { return };
    let launch = Launch::new(&probe::spinning_image());
    let page = abi::lease::LeasePage::open(&launch.directory.path().join("lease")).unwrap();
    let mut config = launch.config();
    config.lease = Some(Resource::Descriptor(3));
    let guest = launch.spawn(&spawner, &config, &[page.reader().unwrap()]).unwrap();
    let client = control::Client::connect(&launch.socket()).unwrap();
    assert_eq!(client.status().unwrap().writes, Writes::Waiting);
    page.renew(abi::lease::now() + std::time::Duration::from_secs(600)).unwrap();
    assert_eq!(client.status().unwrap().writes, Writes::Allowed);
    let hot = file(&[0; 4096]);
    client.add_disk(disk("near", 0), &[hot.as_fd()]).unwrap();
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let refused = client.replace_disk("near", ours.as_fd(), 1).unwrap_err().to_string();
    assert!(refused.contains("on this host"), "{refused}");
    client.kill().unwrap();
    wait(&guest);
    config.lease = Some(Resource::Descriptor(0));
    let error = launch.spawn(&spawner, &config, &[]).unwrap_err().to_string();
    assert!(error.contains("lease"), "{error}");
}

fn disk(id: &str, index: usize) -> DiskConfig {
    DiskConfig::new(id, DiskSource::Raw(Resource::Descriptor(index)), id)
}

fn net(id: &str, indices: [usize; 3]) -> NetConfig {
    NetConfig::new(id, "fa:16:3e:00:00:01", 1450, NetBackend::Ring(indices))
}

#[test]
fn what_can_not_start_is_said_and_the_spawner_goes_on() {
    let Some(spawner) = spawner() else { return };
    let launch = Launch::new(b"no kernel");
    let error = launch.spawn(&spawner, &launch.config(), &[]).unwrap_err().to_string();
    assert!(error.contains("kernel image"), "{error}");
    let mut config = launch.config();
    config.disks.push(disk("gone", 9));
    let error = launch.spawn(&spawner, &config, &[]).unwrap_err().to_string();
    assert!(error.contains("descriptor 9"), "{error}");
    config.memory_mib = 1;
    let error = launch.spawn(&spawner, &config, &[]).unwrap_err().to_string();
    assert!(error.contains("memory_mib"), "{error}");
    let launch = Launch::new(&probe::image(false, 0));
    wait(&launch.spawn(&spawner, &launch.config(), &[]).unwrap());
}

/// The spawner has no file system, so what it executes has no loader: only static programs run.
fn is_static(executable: &[u8]) -> bool {
    !executable.windows(15).any(|window| window == b"/lib64/ld-linux")
}

#[test]
fn the_floor_program_reports_its_first_exit() {
    let Some(spawner) = spawner() else { return };
    let path = env!("CARGO_BIN_EXE_kvm-floor");
    let output = std::process::Command::new(path).args(["64", "1"]).output().unwrap();
    assert!(output.status.success(), "{:?}", output.status);
    assert!(u64::from_ne_bytes(output.stdout[..8].try_into().unwrap()) > 0);

    let floor = File::open(path).unwrap();
    let times = spawner.run_floor(floor.as_fd(), 64);
    if is_static(&std::fs::read(path).unwrap()) {
        let times = times.unwrap();
        assert!(
            times.spawn_ns < times.first_exit_ns && times.first_exit_ns < times.exit_ns,
            "{times:?}"
        );
    } else {
        assert!(times.unwrap_err().to_string().contains("static"));
    }
}
