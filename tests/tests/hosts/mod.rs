//! Hosts on loopback addresses, each with its own data directory, run by the commands that an
//! operator of real hosts types.
// Each test uses its part.
#![allow(dead_code)]

pub(crate) mod power;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tests::trine;

/// How long a test waits for what must happen. Never asserted on.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

/// The hosts of one test; everything of theirs ends with the value.
pub(crate) struct Hosts {
    directory: PathBuf,
    network: String,
    all: Vec<Host>,
}

/// One of them.
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) address: String,
    pub(crate) data: PathBuf,
    log: PathBuf,
    process: Option<Child>,
}

impl Hosts {
    /// None yet, in a directory of their own.
    pub(crate) fn new() -> Result<Hosts> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (pid, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(format!("trine-hosts-{pid}-{number}"));
        fs::create_dir(&directory)?;
        let network = format!("127.{}.{}", 20 + pid / 64 % 40, pid % 64 * 4 + number % 2 * 2);
        Ok(Hosts { directory, network, all: Vec::new() })
    }

    /// A cluster of three that runs; hosts 0 to 2 are nodes 1 to 3.
    pub(crate) fn three() -> Result<Hosts> {
        let mut hosts = Hosts::new()?;
        hosts.add("node1");
        hosts.init(0)?;
        hosts[0].start()?;
        for name in ["node2", "node3"] {
            let index = hosts.add(name);
            let token = hosts[0].trine(&["join-token"])?;
            hosts[index].join(&token)?;
            hosts[index].start()?;
        }
        Ok(hosts)
    }

    /// Starts all of them at one time, as they have to where none of them runs.
    pub(crate) fn start_all(&mut self) -> Result<()> {
        let begun = self.all.iter_mut().map(Host::begin).collect::<Result<Vec<_>>>()?;
        self.all.iter().zip(begun).try_for_each(|(host, ready)| host.wait_until_ready(&ready))
    }

    /// One more machine, with nothing on it.
    pub(crate) fn add(&mut self, name: &str) -> usize {
        let index = self.all.len();
        let data = self.directory.join(format!("host{index}"));
        self.all.push(Host {
            name: name.into(),
            address: format!("{}.{}", self.network, index + 1),
            log: data.with_extension("log"),
            data,
            process: None,
        });
        index
    }

    pub(crate) fn init(&self, index: usize) -> Result<()> {
        let host = &self[index];
        let third: u8 = self.network.rsplit('.').next().context("a network")?.parse()?;
        let base = self.network.rsplit_once('.').context("a network")?.0;
        let pool = format!("{base}.{}.0/24", third + 1);
        let name = ["--address", &host.address, "--name", &host.name];
        host.trine(&[&["init", "--floating-pool", &pool][..], &name].concat()).map(drop)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The directory of all of it.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// `credentials.json` of the first host.
    pub(crate) fn credentials(&self) -> Result<Value> {
        Ok(serde_json::from_slice(&fs::read(self[0].data.join("credentials.json"))?)?)
    }
}

impl std::ops::Index<usize> for Hosts {
    type Output = Host;

    fn index(&self, index: usize) -> &Host {
        &self.all[index]
    }
}

impl std::ops::IndexMut<usize> for Hosts {
    fn index_mut(&mut self, index: usize) -> &mut Host {
        &mut self.all[index]
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        let mut whole = true;
        for host in self.all.iter_mut().filter(|host| host.data.join("node.toml").exists()) {
            whole &= host.end().is_ok();
        }
        if std::thread::panicking() || !whole {
            eprintln!("kept for a look: {}", self.directory.display());
        } else if let Err(error) = fs::remove_dir_all(&self.directory) {
            eprintln!("cannot remove {}: {error}", self.directory.display());
        }
    }
}

impl Host {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(trine());
        command.args(arguments).arg("--data-dir").arg(&self.data);
        command
    }

    /// Runs a command on this host's data directory; what it printed.
    pub(crate) fn trine(&self, arguments: &[&str]) -> Result<String> {
        let output = self.try_trine(arguments)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "trine {} on {}: {said}", arguments.join(" "), self.name);
        Ok(String::from_utf8(output.stdout)?)
    }

    pub(crate) fn try_trine(&self, arguments: &[&str]) -> Result<Output> {
        Ok(self.command(arguments).stdin(Stdio::null()).output()?)
    }

    /// The refusal of a command that must not succeed.
    pub(crate) fn refusal(&self, arguments: &[&str]) -> Result<String> {
        let output = self.try_trine(arguments)?;
        ensure!(!output.status.success(), "trine {} succeeded", arguments.join(" "));
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.trine(&[arguments, &["--json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("no JSON: {text}"))
    }

    pub(crate) fn join(&self, token: &str) -> Result<()> {
        let join = ["join", "--address", &self.address, "--name", &self.name, "--token-file", "-"];
        let mut child = self.command(&join).stdin(Stdio::piped()).spawn()?;
        child.stdin.take().context("a pipe")?.write_all(token.as_bytes())?;
        ensure!(child.wait()?.success(), "{} can't join", self.name);
        Ok(())
    }

    /// Starts the node and waits until it serves.
    pub(crate) fn start(&mut self) -> Result<()> {
        let ready = self.begin()?;
        self.wait_until_ready(&ready)
    }

    /// Starts the node; the receiver hears when it serves.
    fn begin(&mut self) -> Result<mpsc::Receiver<()>> {
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut child = self.command(&["node"]).stdout(Stdio::piped()).stderr(log).spawn()?;
        let output = child.stdout.take().context("a pipe")?;
        self.process = Some(child);
        let (sender, ready) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if line.starts_with("trine node ready") {
                    let _ = sender.send(());
                }
            }
        });
        Ok(ready)
    }

    fn wait_until_ready(&self, ready: &mpsc::Receiver<()>) -> Result<()> {
        match ready.recv_timeout(PATIENCE) {
            Ok(()) => Ok(()),
            Err(_) => bail!("{} does not serve:\n{}", self.name, self.log_tail()),
        }
    }

    /// Starts a node that must end by itself; what it said.
    pub(crate) fn start_in_vain(&mut self) -> Result<String> {
        let log = File::options().create(true).append(true).open(&self.log)?;
        let child = self.command(&["node"]).stdout(Stdio::null()).stderr(log).spawn()?;
        self.process = Some(child);
        self.wait_for_its_end()
    }

    /// Waits until the node ends by itself; what it said.
    pub(crate) fn wait_for_its_end(&mut self) -> Result<String> {
        let started = Instant::now();
        let process = self.process.as_mut().context("it runs")?;
        let status: ExitStatus = loop {
            if let Some(status) = process.try_wait()? {
                break status;
            }
            ensure!(started.elapsed() < PATIENCE, "{} goes on: {}", self.name, self.log_tail());
            std::thread::sleep(Duration::from_millis(50));
        };
        self.process = None;
        ensure!(!status.success(), "{} ended as if all were well", self.name);
        Ok(self.log_tail())
    }

    pub(crate) fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }

    /// SIGKILL to the node process alone.
    pub(crate) fn kill_node(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            process.kill()?;
            process.wait()?;
        }
        Ok(())
    }

    /// A signal to the node process alone.
    pub(crate) fn signal_node(&self, signal: rustix::process::Signal) -> Result<()> {
        let process = self.process.as_ref().context("it runs")?;
        let pid = rustix::process::Pid::from_child(process);
        Ok(rustix::process::kill_process(pid, signal)?)
    }

    /// SIGTERM to the node process alone.
    pub(crate) fn stop_node(&mut self) -> Result<()> {
        self.trine(&["stop"])?;
        if let Some(mut process) = self.process.take() {
            process.wait()?;
        }
        Ok(())
    }

    /// Ends everything on this host, guests too.
    pub(crate) fn end(&mut self) -> Result<()> {
        self.kill_node()?;
        self.trine(&["stop", "--guests"]).map(drop)
    }

    /// The machine is gone for good: nothing runs, nothing is left.
    pub(crate) fn lose(&mut self) -> Result<()> {
        self.end()?;
        Ok(fs::remove_dir_all(&self.data)?)
    }

    pub(crate) fn api(&self) -> String {
        format!("{}:8774", self.address)
    }

    /// Ids and processes of the guests that run here.
    pub(crate) fn guests(&self) -> Result<Vec<(String, u64)>> {
        let status = self.json(&["status"])?;
        let guests = status["guests"].as_array().context("guests")?.iter();
        let running = guests.filter(|guest| guest["state"] == "running");
        running
            .map(|guest| {
                let id = guest["id"].as_str().context("id")?.to_owned();
                Ok((id, guest["pid"].as_u64().context("pid")?))
            })
            .collect()
    }

    /// Asks `trine cluster status` until it is right.
    pub(crate) fn until(&self, what: &str, right: impl Fn(&Value) -> bool) -> Result<Value> {
        let started = Instant::now();
        loop {
            let status = self.json(&["cluster", "status"])?;
            if right(&status) {
                return Ok(status);
            }
            ensure!(started.elapsed() < PATIENCE, "waited for {what}: {status}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// The rows of a list in a status.
pub(crate) fn rows<'a>(status: &'a Value, list: &str) -> impl Iterator<Item = &'a Value> {
    status[list].as_array().into_iter().flatten()
}

/// The ids of members that vote.
pub(crate) fn voters(status: &Value) -> Vec<u64> {
    let voters = rows(status, "members").filter(|member| member["role"] != "learner");
    voters.filter_map(|member| member["id"].as_u64()).collect()
}

/// Whether a file is there and only its owner reads it.
pub(crate) fn is_secret(path: &Path) -> Result<bool> {
    use std::os::unix::fs::PermissionsExt;
    Ok(fs::metadata(path)?.permissions().mode() & 0o777 == 0o600)
}
