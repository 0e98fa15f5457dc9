//! One guest under test: its process, what it says, how it ends.

use serde_json::{Value, json};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use vmm::control::{Client, ExitRecord};

const VMM: &str = "/bin/trine-vmm";
const INITRD: &str = "/guest/initrd";
/// `noxsave`: the emulated host's processor (QEMU 7.2) doesn't intercept XSETBV, so its KVM never learns
/// what the guest has enabled, and takes it away again at the next exit.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 noxsave";
/// The emulated host interprets its own processor: everything takes long.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) type Outcome = Result<(), String>;

pub(crate) fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

pub(crate) fn expect<T: PartialEq + std::fmt::Debug + ?Sized>(
    what: &str,
    is: &T,
    should: &T,
) -> Outcome {
    if is == should { Ok(()) } else { Err(format!("{what}: {is:?} instead of {should:?}")) }
}

/// What a guest has said so far.
#[derive(Default)]
struct Said {
    output: Mutex<(String, bool)>,
    more: Condvar,
}

impl Said {
    fn read(&self, mut from: impl Read) {
        let mut buffer = [0; 4096];
        loop {
            let read = from.read(&mut buffer).unwrap_or(0);
            let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
            output.0.push_str(&String::from_utf8_lossy(&buffer[..read]));
            output.1 |= read == 0;
            self.more.notify_all();
            if read == 0 {
                return;
            }
        }
    }
}

/// One guest after another, in a directory of the test's own.
pub(crate) struct Guest {
    pub(crate) directory: PathBuf,
    child: Option<Child>,
    said: Arc<Said>,
}

impl Guest {
    pub(crate) fn new(name: &str) -> Guest {
        let directory = std::env::temp_dir().join(name);
        let _ = std::fs::create_dir_all(&directory);
        Guest { directory, child: None, said: Arc::default() }
    }

    pub(crate) fn start(&mut self, kernel: &str, step: &str, extra: Value) -> Outcome {
        let mut config = json!({
            "boot": {
                "kernel": {"path": kernel},
                "initrd": {"path": INITRD},
                "cmdline": format!("{CMDLINE} step={step}"),
            },
            "control": {"path": self.directory.join("control")},
        });
        merge(&mut config, extra);
        self.run(config)
    }

    pub(crate) fn run(&mut self, extra: Value) -> Outcome {
        let path = |name: &str| self.directory.join(name);
        let mut config =
            json!({"version": 1, "id": "linux", "exit_record": {"path": path("exit")}});
        merge(&mut config, extra);
        std::fs::write(path("config"), config.to_string()).map_err(text)?;
        let mut child = Command::new(VMM)
            .args(["run", "--config"])
            .arg(path("config"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(text)?;
        self.said = Arc::default();
        let (stdout, said) = (child.stdout.take(), Arc::clone(&self.said));
        std::thread::spawn(move || stdout.map(|stdout| said.read(stdout)));
        self.child = Some(child);
        Ok(())
    }

    pub(crate) fn file(&self, name: &str, bytes: u64) -> Result<File, String> {
        let path = self.directory.join(name);
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path);
        file.and_then(|file| file.set_len(bytes).map(|()| file)).map_err(text)
    }

    pub(crate) fn client(&self) -> Result<Client, String> {
        Client::connect(&self.directory.join("control")).map_err(text)
    }

    pub(crate) fn said(&self) -> String {
        self.said.output.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.said().lines().map(str::to_string).collect()
    }

    /// Waits for a whole line that contains `wanted`.
    pub(crate) fn wait_for(&self, wanted: &str) -> Result<String, String> {
        let deadline = Instant::now() + DEADLINE;
        let mut output = self.said.output.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let whole = output.0.rfind('\n').map_or("", |end| &output.0[..end]);
            if let Some(line) = whole.lines().find(|line| line.contains(wanted)) {
                return Ok(line.to_string());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if output.1 || left.is_zero() {
                let why = if output.1 { "it ended" } else { "time ran out" };
                return Err(format!("{wanted:?} was never said: {why}"));
            }
            let waited = self.said.more.wait_timeout(output, left);
            output = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for the VMM's end; its exit code and its standard error.
    pub(crate) fn finish(&mut self) -> Result<(Option<i32>, String), String> {
        let mut child = self.child.take().ok_or("nothing runs")?;
        let deadline = Instant::now() + DEADLINE;
        let status = loop {
            match child.try_wait().map_err(text)? {
                Some(status) => break status,
                None if Instant::now() > deadline => {
                    let _ = child.kill();
                    return Err("the guest did not end".into());
                }
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let mut errors = String::new();
        if let Some(mut stderr) = child.stderr.take() {
            let _ = stderr.read_to_string(&mut errors);
        }
        Ok((status.code(), errors))
    }

    pub(crate) fn ends_with(&mut self, reason: &str, code: Option<u8>) -> Outcome {
        let (status, errors) = self.finish()?;
        let record = std::fs::read(self.directory.join("exit")).map_err(text)?;
        let record: ExitRecord = serde_json::from_slice(&record)
            .map_err(|error| format!("exit record: {error}; {errors}"))?;
        let is = (record.reason.as_str(), record.code);
        expect("the exit record", &is, &(reason, code))
            .and_then(|()| match code {
                Some(code) => expect("the exit code", &status, &Some(i32::from(code))),
                None => Ok(()),
            })
            .map_err(|why| format!("{why}; {} {errors}", record.message))
    }

    /// The guest is not started, and one line says why.
    pub(crate) fn refused(&mut self, why: &str) -> Outcome {
        let (status, errors) = self.finish()?;
        expect("the exit code", &status, &Some(2))?;
        if errors.lines().count() != 1 || !errors.contains(why) {
            return Err(format!("{errors:?} does not say {why:?} in one line"));
        }
        expect("its control socket", &self.directory.join("control").exists(), &false)
    }

    pub(crate) fn end(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = remove(&self.directory);
    }
}

fn remove(directory: &Path) -> std::io::Result<()> {
    std::fs::remove_dir_all(directory)
}

fn merge(into: &mut Value, extra: Value) {
    if let (Some(into), Value::Object(extra)) = (into.as_object_mut(), extra) {
        into.extend(extra);
    }
}
