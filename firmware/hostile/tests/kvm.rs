//! Guests that mean harm, in the project's own VMM: they and their VMM survive, or they end alone
//! with a clear reason, and a guest beside them notices nothing.
//!
//! The VMM is `TRINE_VMM`, or the one that the project's workspace has built. Without it, or
//! without `/dev/kvm`, a test says so and ends.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a guest may take for all that it does.
const DEADLINE: Duration = Duration::from_secs(120);
const DISK_BYTES: usize = 1 << 20;
/// Exit code of the VMM where the guest gave none.
const FAILED: i32 = 125;

/// A directory for one test, removed at its end.
struct Directory(PathBuf);

impl Directory {
    fn new(test: &str) -> Directory {
        let path =
            std::env::temp_dir().join(format!("trine-hostile-{test}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Directory(path)
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The VMM, or `None` after saying what is missing.
fn vmm(test: &str) -> Option<PathBuf> {
    if let Err(error) = File::options().read(true).write(true).open("/dev/kvm") {
        eprintln!("SKIPPED {test}: no /dev/kvm: {error}");
        return None;
    }
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/debug/trine-vmm");
    let path = std::env::var_os("TRINE_VMM").map_or(built, PathBuf::from);
    if !path.is_file() {
        eprintln!("SKIPPED {test}: no VMM at {}; set TRINE_VMM", path.display());
        return None;
    }
    Some(path)
}

fn disk(id: &str, path: &Path) -> String {
    format!(r#"{{"id": "{id}", "source": {{"raw": {{"path": "{}"}}}}}}"#, path.display())
}

/// A VMM that is about to run the hostile image, in a network of its own where there is a device
/// for it. `more` is the rest of the configuration, as members of a JSON object.
fn command(vmm: &Path, directory: &Directory, name: &str, cmdline: &str, more: &str) -> Command {
    let config = format!(
        r#"{{"version": 1, "id": "{name}", "memory_mib": 32,
            "boot": {{"kernel": {{"path": "{}"}}, "cmdline": "{cmdline}"}}{more}}}"#,
        env!("CARGO_BIN_EXE_hostile"),
    );
    let config = directory.file(&format!("{name}.json"), config.as_bytes());
    let mut command = if more.contains(r#""nets""#) {
        let mut command = Command::new("unshare");
        command.arg("--net").arg("--").arg(vmm);
        command
    } else {
        Command::new(vmm)
    };
    command.args(["run", "--config"]).arg(config).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Whether a network device can be had here: a TAP interface in a network of its own.
fn can_have_a_network() -> bool {
    File::options().read(true).write(true).open("/dev/net/tun").is_ok()
        && Command::new("unshare").args(["--net", "true"]).status().is_ok_and(|it| it.success())
}

/// What a guest left behind.
struct End {
    code: Option<i32>,
    console: String,
    reason: String,
}

/// Runs a guest to its end; one that does not end in time is ended, and its code is `None`.
fn run(mut command: Command) -> End {
    let mut child = command.spawn().unwrap();
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let read = std::thread::spawn(move || {
        let mut console = Vec::new();
        out.read_to_end(&mut console).map(|_| console)
    });
    let start = Instant::now();
    let mut timed_out = false;
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > DEADLINE {
            timed_out = true;
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let code = child.wait().unwrap().code().filter(|_| !timed_out);
    let mut reason = String::new();
    err.read_to_string(&mut reason).unwrap();
    let console = String::from_utf8_lossy(&read.join().unwrap().unwrap()).into_owned();
    End { code, console, reason }
}

/// A guest that does honest work beside the hostile ones.
struct Neighbour {
    child: Child,
    rounds: Arc<AtomicU64>,
}

impl Neighbour {
    fn start(vmm: &Path, directory: &Directory) -> Neighbour {
        let image = directory.file("neighbour.disk", &vec![0; DISK_BYTES]);
        let disks = format!(r#", "disks": [{}]"#, disk("honest", &image));
        let mut child = command(vmm, directory, "neighbour", "neighbour", &disks).spawn().unwrap();
        let console = BufReader::new(child.stdout.take().unwrap());
        let rounds = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&rounds);
        std::thread::spawn(move || {
            for line in console.lines().map_while(Result::ok) {
                if line.starts_with("neighbour: round ") && line.ends_with(" ok") {
                    counted.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        let neighbour = Neighbour { child, rounds };
        neighbour.goes_on();
        neighbour
    }

    /// Waits for another twenty rounds.
    fn goes_on(&self) {
        let before = self.rounds.load(Ordering::SeqCst);
        let start = Instant::now();
        while self.rounds.load(Ordering::SeqCst) < before + 20 {
            assert!(start.elapsed() < DEADLINE, "the guest beside stopped after {before} rounds");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// It has seen no failure, and its VMM had nothing to say.
    fn finish(mut self) {
        self.goes_on();
        assert!(self.child.try_wait().unwrap().is_none(), "the guest beside has ended");
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(said, "");
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Devices for a guest that attacks all it has.
fn devices(directory: &Directory) -> (String, usize) {
    let image = |name: &str| directory.file(name, &vec![0; DISK_BYTES]);
    let disks = format!(
        r#", "disks": [{}, {}]"#,
        disk("one", &image("one.disk")),
        disk("two", &image("two.disk"))
    );
    let socket = directory.0.join("vsock");
    let _ = fs::remove_file(&socket);
    let others = format!(
        r#"{disks}, "rng": {{}}, "vsock": {{"cid": 3, "socket": {{"path": "{}"}}}}"#,
        socket.display()
    );
    if can_have_a_network() {
        let nic =
            r#"{"id": "nic", "mac": "fa:16:3e:00:00:01", "backend": {"tap": {"path": "tap0"}}}"#;
        return (format!(r#"{others}, "nets": [{nic}]"#), 5);
    }
    eprintln!("no network device is attacked: a TAP interface in a network of its own needs root");
    (others, 4)
}

/// The attacks whose devices must ask for a reset at least once; the others need not.
const BITES: [&str; 2] = ["queue-addresses", "index"];

#[test]
fn devices_survive_every_attack_and_a_guest_beside_notices_nothing() {
    let Some(vmm) = vmm("devices_survive_every_attack") else { return };
    let directory = Directory::new("attack");
    let neighbour = Neighbour::start(&vmm, &directory);
    for seed in [1, 2] {
        let (more, count) = devices(&directory);
        let cmdline = format!("attack seed={seed}");
        let end = run(command(&vmm, &directory, "attacker", &cmdline, &more));
        let lines: BTreeSet<&str> =
            end.console.lines().filter(|line| line.starts_with("hostile: ")).collect();
        assert_eq!(end.code, Some(0), "seed {seed}: {}: {lines:#?}", end.reason);
        assert_eq!(end.reason, "", "seed {seed}");
        assert!(end.console.contains("hostile: done\n"), "seed {seed}: {lines:#?}");
        let survived = lines.iter().filter(|line| line.contains(" ok after ")).count();
        assert!(survived >= 19 * count, "seed {seed}: {survived} of {count} devices: {lines:#?}");
        for name in BITES {
            let start = format!("hostile: {name} slot ");
            let mut of_it = lines.iter().filter(|line| line.starts_with(&start)).peekable();
            assert!(of_it.peek().is_some(), "seed {seed}: {name} did not run");
            for line in of_it {
                assert!(!line.ends_with(" 0 refusals"), "seed {seed}: nothing refused: {line}");
            }
        }
        neighbour.goes_on();
    }
    neighbour.finish();
}

/// How a guest must end.
enum Must {
    /// With this in the reason.
    Crash(&'static str),
    /// The host's processor and KVM decide whether it goes on or ends with a reason.
    GoOnOrCrash,
}

#[test]
fn a_guest_that_ends_itself_ends_alone_and_its_reason_is_one_clear_line() {
    let Some(vmm) = vmm("a_guest_that_ends_itself_ends_alone") else { return };
    let directory = Directory::new("deaths");
    let neighbour = Neighbour::start(&vmm, &directory);
    for (name, must) in [
        ("run-nowhere", Must::Crash("KVM")),
        ("run-registers", Must::Crash("KVM")),
        ("run-configuration", Must::Crash("KVM")),
        ("wipe", Must::Crash("triple fault")),
        ("stack-nowhere", Must::Crash("triple fault")),
        ("exotic", Must::GoOnOrCrash),
        ("hypercalls", Must::GoOnOrCrash),
        ("nmi", Must::GoOnOrCrash),
        ("init", Must::GoOnOrCrash),
        ("smi", Must::GoOnOrCrash),
    ] {
        let image = directory.file("disk", &vec![0; DISK_BYTES]);
        let disks = format!(r#", "disks": [{}]"#, disk("one", &image));
        let end = run(command(&vmm, &directory, "dying", &format!("die={name}"), &disks));
        assert!(end.console.contains(&format!("hostile: now {name}\n")), "{name}");
        let went_on = end.code == Some(0) && end.console.contains("hostile: still here\n");
        match must {
            Must::GoOnOrCrash if went_on => assert_eq!(end.reason, "", "{name}"),
            Must::GoOnOrCrash => check_crash(name, &end, ""),
            Must::Crash(why) => check_crash(name, &end, why),
        }
    }
    neighbour.finish();
}

fn check_crash(name: &str, end: &End, why: &str) {
    assert_eq!(end.code, Some(FAILED), "{name}: {}", end.reason);
    let start = "trine-vmm: guest ended: crash: ";
    assert!(end.reason.starts_with(start), "{name}: {}", end.reason);
    assert!(end.reason.contains(why) && end.reason.contains("rip 0x"), "{name}: {}", end.reason);
    assert_eq!(end.reason.lines().count(), 1, "{name}: {}", end.reason);
}

#[test]
fn a_guest_that_never_yields_is_ended_from_outside() {
    let Some(vmm) = vmm("a_guest_that_never_yields_is_ended_from_outside") else { return };
    let directory = Directory::new("spin");
    let mut child = command(&vmm, &directory, "spin", "die=spin", "").spawn().unwrap();
    let mut first = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
    assert_eq!(first, "hostile: now spin\n");
    let ended = Command::new("kill").arg(child.id().to_string()).status().unwrap();
    assert!(ended.success());
    assert_eq!(child.wait().unwrap().code(), Some(FAILED));
}
