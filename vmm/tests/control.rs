//! A running guest's control socket: typed, versioned requests and nothing else; and what people
//! type, `trine-vmm control`.

mod scripted;

use scripted::Script;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use vmm::control::server::REQUEST_BYTES_MAX;
use vmm::control::{Client, Reply, Status};

const DEADLINE: Duration = Duration::from_secs(60);

/// `trine-vmm run`, with a control socket.
struct Vm {
    directory: tempfile::TempDir,
    child: Child,
}

impl Vm {
    /// Runs `image` with a disk of 1 MiB.
    fn start(image: &[u8], arguments: &[&str]) -> Option<Vm> {
        if std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
            eprintln!("SKIPPED: no /dev/kvm");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::write(path("kernel"), image).unwrap();
        std::fs::write(path("disk"), vec![0; 1 << 20]).unwrap();
        let config = serde_json::json!({
            "version": 1, "id": "test", "memory_mib": 16,
            "boot": {"kernel": {"path": path("kernel")}},
            "disks": [{"id": "root", "source": {"raw": {"path": path("disk")}}}],
            "control": {"path": path("control")},
            "exit_record": {"path": path("exit")},
        });
        std::fs::write(path("config"), config.to_string()).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_trine-vmm"))
            .arg("run")
            .args(arguments)
            .arg("--config")
            .arg(path("config"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let vm = Vm { directory, child };
        vm.until("its control socket answers", || {
            Client::connect(&vm.path("control")).is_ok_and(|client| client.status().is_ok())
        });
        Some(vm)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < DEADLINE, "{what}");
            std::thread::yield_now();
        }
    }

    /// `trine-vmm control SOCKET COMMAND`.
    fn control(&self, command: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_trine-vmm"))
            .arg("control")
            .arg(self.path("control"))
            .args(command)
            .output()
            .unwrap()
    }

    /// As `control`; what it printed.
    fn done(&self, command: &[&str]) -> String {
        let output = self.control(command);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && error.is_empty(), "{command:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// As `control`; the one line that says why not.
    fn refused(&self, command: &[&str]) -> String {
        let output = self.control(command);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{command:?}: {error}");
        assert_eq!((error.lines().count(), output.stdout.len()), (1, 0), "{error}");
        error
    }

    fn counter(&self) -> u32 {
        let disk = std::fs::File::open(self.path("disk")).unwrap();
        let mut word = [0; 4];
        disk.read_exact_at(&mut word, 0).unwrap();
        u32::from_le_bytes(word)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes a growing number to its disk, again and again.
fn writing_guest() -> Vec<u8> {
    let mut script = Script::default();
    script.start(1, 1);
    script.block(1, 1, 0, 512);
    script.offer_forever(1, 0);
    script.image(0)
}

/// Sends bytes as they are and returns the reply, `None` where the connection was closed.
fn say(vm: &Vm, bytes: &[u8], descriptors: &[&std::fs::File]) -> (UnixStream, Option<Reply>) {
    let socket = UnixStream::connect(vm.path("control")).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    if descriptors.is_empty() {
        (&socket).write_all(bytes).unwrap();
    } else {
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        abi::control::send(&socket, &bytes[4..], &descriptors).unwrap();
    }
    let reply = abi::control::receive(&socket).unwrap();
    (socket, reply.map(|(reply, _)| serde_json::from_slice(&reply).unwrap()))
}

fn frame(json: &str) -> Vec<u8> {
    [&(json.len() as u32).to_le_bytes()[..], json.as_bytes()].concat()
}

#[test]
fn only_typed_and_versioned_requests_are_taken() {
    let Some(vm) = Vm::start(&vmm::probe::spinning_image(), &[]) else { return };
    for (request, expected) in [
        (r#"{"version": 2, "request": "status"}"#, "request version 2; this VMM speaks 1"),
        (r#"{"request": "status"}"#, "missing field `version`"),
        (r#"{"version": 1, "request": "status", "more": 1}"#, "unknown field `more`"),
        (r#"{"version": 1, "request": "open"}"#, "unknown variant `open`"),
        (r#"{"version": 1, "request": {"remove_disk": {"id": "a", "by": "b"}}}"#, "unknown field"),
        (r#"{"version": 1, "request": {"remove_disk": {}}}"#, "missing field `id`"),
        (r#"{"version": "1", "request": "status"}"#, "invalid type"),
        ("", "EOF"),
        ("\0\u{1}", "expected value"),
    ] {
        let (socket, reply) = say(&vm, &frame(request), &[]);
        let Some(Reply::Error { kind, message }) = reply else { panic!("{request}: {reply:?}") };
        assert_eq!(kind, "invalid", "{request}");
        assert!(message.contains(expected), "{request}: {message}");
        // The connection goes on.
        (&socket).write_all(&frame(r#"{"version": 1, "request": "status"}"#)).unwrap();
        assert!(abi::control::receive(&socket).unwrap().is_some());
    }
    // A device by path: a closed process opens nothing.
    let by_path = r#"{"version": 1, "request": {"add_disk":
        {"id": "a", "source": {"raw": {"path": "/etc/passwd"}}}}}"#;
    let (_, reply) = say(&vm, &frame(by_path), &[]);
    let Some(Reply::Error { message, .. }) = reply else { panic!("{reply:?}") };
    assert!(message.contains("only descriptors are taken"), "{message}");
    // Too long: refused before it is read, and the connection ends.
    let (mut socket, reply) = say(&vm, &(REQUEST_BYTES_MAX as u32 + 1).to_le_bytes(), &[]);
    assert!(matches!(reply, Some(Reply::Error { kind, .. }) if kind == "invalid"));
    assert_eq!(socket.read(&mut [0]).unwrap(), 0);
    // Cut off in its middle: nobody waits for the rest.
    let socket = UnixStream::connect(vm.path("control")).unwrap();
    (&socket).write_all(&frame(r#"{"version": 1, "request": "kill"}"#)[..20]).unwrap();
    drop(socket);
    vm.done(&["status"]);
}

#[test]
fn descriptors_are_taken_only_where_they_belong_and_none_is_kept() {
    let Some(vm) = Vm::start(&vmm::probe::spinning_image(), &[]) else { return };
    let pid = Client::connect(&vm.path("control")).unwrap().status().unwrap().pid;
    let open = || std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
    let before = open();
    let file = tempfile::tempfile().unwrap();
    let add = |index: usize| {
        let disk = format!(r#"{{"id": "a", "source": {{"raw": {{"descriptor": {index}}}}}}}"#);
        frame(&format!(r#"{{"version": 1, "request": {{"add_disk": {disk}}}}}"#))
    };
    for (request, files, expected) in [
        (frame(r#"{"version": 1, "request": "status"}"#), 1, "no descriptors go with it"),
        (frame(r#"{"version": 1, "request": "pause"}"#), 64, "no descriptors go with it"),
        (add(1), 1, "descriptor 1 did not come"),
        (add(usize::MAX), 1, "did not come"),
        // An empty file has no sector.
        (add(0), 1, "at least one sector"),
    ] {
        let (_, reply) = say(&vm, &request, &vec![&file; files]);
        let Some(Reply::Error { message, .. }) = reply else { panic!("{reply:?}") };
        assert!(message.contains(expected), "{message}");
    }
    // Connections close in their own time.
    vm.until("no descriptor is left", || open() <= before);
    assert!(vm.done(&["status"]).contains(r#""state": "running""#));
}

#[test]
fn paused_means_that_the_disk_stands_still_until_it_goes_on() {
    let Some(vm) = Vm::start(&writing_guest(), &[]) else { return };
    for _ in 0..5 {
        let before = vm.counter();
        vm.until("the guest writes", || vm.counter() != before);
        vm.done(&["pause"]);
        let paused = vm.counter();
        for _ in 0..3 {
            let status: Status = serde_json::from_str(&vm.done(&["status"])).unwrap();
            assert_eq!(status.state, vmm::control::RunState::Paused);
            assert_eq!(vm.counter(), paused);
        }
        // Again is no harm.
        vm.done(&["pause"]);
        assert_eq!(vm.counter(), paused);
        vm.done(&["resume"]);
    }
    let before = vm.counter();
    vm.until("the guest writes on", || vm.counter() != before);
}

#[test]
fn limits_are_changed_while_the_guest_writes() {
    let Some(vm) = Vm::start(&writing_guest(), &[]) else { return };
    vm.until("the guest writes", || vm.counter() > 1000);
    vm.done(&["set-disk-limits", "root", r#"{"operations": {"per_second": 1, "burst": 1}}"#]);
    // It may have been on its way past the old limits.
    let (start, before) = (Instant::now(), vm.counter());
    vm.until("two more writes", || vm.counter() >= before + 3);
    let (more, seconds) = (vm.counter() - before, start.elapsed().as_secs() as u32);
    assert!(seconds >= 1 && more <= seconds + 3, "{more} writes in {seconds} s");
    vm.done(&["set-disk-limits", "root", "{}"]);
    let before = vm.counter();
    vm.until("many more writes", || vm.counter() > before + 1000);

    for (command, expected) in [
        (&["set-disk-limits", "root", r#"{"operations": {"per_second": 0}}"#][..], "per_second: 0"),
        (&["set-disk-limits", "root", r#"{"ops": {"per_second": 1}}"#], "unknown field `ops`"),
        (&["set-disk-limits", "other", "{}"], "no disk \"other\""),
        (&["set-net-limits", "root", "{}"], "no network device \"root\""),
        (&["set-net-limits", "root", r#"{"bytes": {}}"#], "unknown field `bytes`"),
        (&["set-disk-limits", "root"], "no control command"),
    ] {
        let line = vm.refused(command);
        assert!(line.contains(expected), "{command:?}: {line}");
    }
}

#[test]
fn a_guest_that_a_signal_ends_leaves_a_record_and_no_socket() {
    for (signal, to_guest) in [(libc::SIGTERM, false), (libc::SIGKILL, true)] {
        let Some(mut vm) = Vm::start(&vmm::probe::spinning_image(), &[]) else { return };
        let guest = Client::connect(&vm.path("control")).unwrap().status().unwrap().pid;
        let target = if to_guest { guest } else { vm.child.id() };
        // SAFETY: plain call on integers; both processes are this test's.
        assert_eq!(unsafe { libc::kill(target as i32, signal) }, 0);
        assert_eq!(vm.child.wait().unwrap().code(), Some(125));
        let record = std::fs::read(vm.path("exit")).unwrap();
        let record: vmm::control::ExitRecord = serde_json::from_slice(&record).unwrap();
        assert_eq!(record.reason, "killed");
        assert_eq!(record.message, "its process was ended by signal 9");
        assert!(record.cpu_ns > 0);
        assert!(!vm.path("control").exists());
    }
}

#[test]
fn a_guest_is_driven_by_commands() {
    let mut script = Script::default();
    script.start(1, 1);
    script.forever(|_| {});
    let Some(vm) = Vm::start(&script.image(0), &["--boot-timer"]) else { return };
    std::fs::write(vm.path("data"), vec![0; 4096]).unwrap();
    let disk =
        |path: &str| format!(r#"{{"id": "data", "source": {{"raw": {{"path": {path:?}}}}}}}"#);
    let data = disk(vm.path("data").to_str().unwrap());
    vm.done(&["add-disk", &data]);
    assert!(vm.refused(&["add-disk", &data]).contains("\"data\" exists"));
    assert!(vm.refused(&["add-disk", &disk("/nonexistent")]).contains("open /nonexistent"));
    assert!(vm.refused(&["add-disk", "{}"]).contains("missing field `id`"));
    assert!(vm.refused(&["add-disk", &data.replace("path", "pfad")]).contains("pfad"));
    assert!(vm.refused(&["remove-net", "data"]).contains("no network device \"data\""));
    assert!(vm.refused(&["balloon"]).contains("balloon"));
    assert!(vm.refused(&["balloon", "much"]).contains("\"much\" is not a number"));
    assert!(vm.refused(&["dance"]).contains("\"dance\" is no control command"));

    // The guest does not let go of its disk: that is said, and it can be pulled out.
    let control = vm.path("control");
    let asking = std::thread::spawn(move || Client::connect(&control).unwrap().remove_disk("root"));
    let status = || serde_json::from_str::<Status>(&vm.done(&["status"])).unwrap();
    vm.until("it is unplugging", || !status().unplugging.is_empty());
    let unplugging = status().unplugging;
    assert_eq!(unplugging[0].id, "root");
    assert!(unplugging[0].since_unix_ms > 1_600_000_000_000);
    assert!(
        vm.done(&["metrics"])
            .contains("trine_vmm_device_unplugging{vm=\"test\",device=\"root\",kind=\"disk\"} 1")
    );
    vm.done(&["force-remove", "root"]);
    asking.join().unwrap().unwrap();
    assert_eq!((status().disks, status().unplugging), (vec!["data".to_string()], vec![]));
    assert!(vm.refused(&["force-remove", "root"]).contains("no disk or network device \"root\""));

    let metrics = vm.done(&["metrics"]);
    for line in ["trine_vmm_running{vm=\"test\"} 1", "trine_vmm_memory_bytes{vm=\"test\"} 16777216"]
    {
        assert!(metrics.lines().any(|it| it == line), "{metrics}");
    }
    vm.done(&["kill"]);
    let mut vm = vm;
    let mut said = String::new();
    vm.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(vm.child.wait().unwrap().code(), Some(125));
    assert!(said.contains("boot timer: process ") && said.contains("first_exit "), "{said}");
    assert!(said.contains("guest ended: killed"), "{said}");
    assert!(!vm.path("control").exists() && vm.path("exit").exists());
    assert!(vm.refused(&["status"]).contains("control"));
}
