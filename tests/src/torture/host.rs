//! A host: a process that holds a PID, a mount and a network namespace with a disk of its own, and what
//! runs in them. Whatever ends this process ends the host: its first process waits for the end of
//! a pipe that we hold, and the kernel ends all that is in a PID namespace with its first process.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use super::clock::Clock;
use super::wire;

/// Size of a host's disk. The file is sparse.
const DISK_BYTES: u64 = 32 << 30;

/// What the first process of a host does: mounts, then waits, reaping what others leave.
const FIRST_PROCESS: &str = "\
    set -e\n\
    mount -o loop \"$1\" \"$2\"\n\
    mkdir -p /run/trine\n\
    mount -t tmpfs tmpfs /run/trine\n\
    mount -t tmpfs tmpfs /dev/shm\n\
    ip link set lo up\n\
    echo ready\n\
    exec 3<&0\n\
    cat <&3 >/dev/null &\n\
    wait $!\n";

/// A process of trine on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Role {
    Node,
    Switch,
    Storage,
}

impl Role {
    pub(super) const ALL: [Role; 3] = [Role::Node, Role::Switch, Role::Storage];

    /// The subcommand.
    pub(super) fn name(self) -> &'static str {
        match self {
            Role::Node => "node",
            Role::Switch => "switch",
            Role::Storage => "storage",
        }
    }
}

/// A process inside a host, by the id it has outside.
#[derive(Clone, Debug)]
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) arguments: Vec<String>,
}

impl Process {
    fn is(&self, role: Role) -> bool {
        let program = self.arguments.first().map(|path| Path::new(path).file_name());
        program == Some(Some(OsStr::new("trine")))
            && self.arguments.get(1).is_some_and(|word| word == role.name())
    }
}

/// A host.
pub(super) struct Host {
    /// `host1` …
    pub(super) name: String,
    pub(super) address: Ipv4Addr,
    trine: PathBuf,
    /// Logs and the disk's file, outside.
    directory: PathBuf,
    namespaces: Child,
    anchor: Option<ChildStdin>,
    /// The host's first process, by its id outside.
    pub(super) first: i32,
    pub(super) clock: Clock,
    node: Option<Child>,
}

impl Host {
    /// Makes host `number` (from 1) below `directory`.
    pub(super) fn make(trine: &Path, directory: &Path, number: usize) -> Result<Host> {
        let name = format!("host{number}");
        let directory = directory.join(&name);
        let disk = directory.join("disk");
        fs::create_dir_all(&disk)?;
        let image = directory.join("disk.img");
        File::create(&image)?.set_len(DISK_BYTES)?;
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&image))?;
        let clock = Clock::new(&directory)?;
        let mut namespaces = Command::new("unshare")
            .args(["--net", "--mount", "--pid", "--fork", "--mount-proc", "--propagation"])
            .args(["private", "sh", "-c", FIRST_PROCESS, "sh"])
            .arg(&image)
            .arg(&disk)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .context("cannot start unshare (util-linux)")?;
        let anchor = namespaces.stdin.take();
        let output = namespaces.stdout.take().context("its output is piped")?;
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        let mut host = Host {
            name,
            address: Ipv4Addr::new(10, 99, 0, number as u8),
            trine: trine.to_path_buf(),
            directory,
            namespaces,
            anchor,
            first: 0,
            clock,
            node: None,
        };
        ensure!(line == "ready\n", "{} could not be made; see the message above", host.name);
        host.first = host.find_first()?;
        Ok(host)
    }

    fn find_first(&self) -> Result<i32> {
        let id = self.namespaces.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"))?;
        let first = children.split_whitespace().next().context("unshare has no child")?;
        Ok(first.parse()?)
    }

    /// Gives the host's end of the wire its address.
    pub(super) fn connect(&self) -> Result<()> {
        let address = format!("{}/24", self.address);
        run(self.command("ip").args(["address", "add", &address, "dev", wire::DEVICE]))?;
        run(self.command("ip").args(["link", "set", wire::DEVICE, "up"]))
    }

    /// A command inside the host, with the host's clock.
    fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.first.to_string(), "--net", "--mount", "--pid", "--"])
            .arg(program)
            .process_group(0)
            .stdin(Stdio::null());
        self.clock.set_environment(&mut command);
        command
    }

    /// The data directory, as it is called inside.
    fn data_directory(&self) -> PathBuf {
        self.directory.join("disk/trine")
    }

    /// A path of the data directory as it is reached from outside.
    pub(super) fn data(&self, path: &str) -> PathBuf {
        let inside = self.data_directory().join(path);
        let mut outside = PathBuf::from(format!("/proc/{}/root", self.first));
        outside.extend(inside.components().skip(1));
        outside
    }

    /// Runs a `trine` command on the data directory and returns what it printed.
    pub(super) fn trine(&self, arguments: &[&str], input: Option<&str>) -> Result<String> {
        let mut command = self.command(&self.trine);
        command.args(arguments).arg("--data-dir").arg(self.data_directory());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start nsenter (util-linux)")?;
        if let Some(mut pipe) = child.stdin.take() {
            pipe.write_all(input.unwrap_or_default().as_bytes())?;
        }
        let output = child.wait_with_output()?;
        let message = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "trine {} on {}: {}",
            arguments[0],
            self.name,
            message.trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// `trine status --json`.
    pub(super) fn status(&self) -> Result<Value> {
        serde_json::from_str(&self.trine(&["status", "--json"], None)?)
            .context("trine status printed no JSON")
    }

    /// Starts the node, where it does not run.
    pub(super) fn start_node(&mut self) -> Result<()> {
        if !self.find(Role::Node)?.is_empty() {
            return Ok(());
        }
        self.reap();
        let log =
            File::options().create(true).append(true).open(self.directory.join("node.log"))?;
        let mut command = self.command(&self.trine);
        command.arg("node").arg("--data-dir").arg(self.data_directory());
        command.stdout(log.try_clone()?).stderr(log);
        self.node = Some(command.spawn()?);
        Ok(())
    }

    fn reap(&mut self) {
        if let Some(mut node) = self.node.take() {
            let _ = node.kill();
            let _ = node.wait();
        }
    }

    /// All processes in the host's PID namespace but those that hold it.
    pub(super) fn processes(&self) -> Result<Vec<Process>> {
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let own = namespace(self.first).context("the host's first process is gone")?;
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            if pid == self.first || namespace(pid).as_ref() != Some(&own) {
                continue;
            }
            let mut line = Vec::new();
            // Empty for a process that ended and is not reaped.
            if let Ok(mut file) = File::open(format!("/proc/{pid}/cmdline")) {
                let _ = file.read_to_end(&mut line);
            }
            let words = line.split(|byte| *byte == 0).filter(|word| !word.is_empty());
            let arguments: Vec<String> =
                words.map(|word| String::from_utf8_lossy(word).into_owned()).collect();
            if !arguments.is_empty() && arguments[0] != "cat" {
                found.push(Process { pid, arguments });
            }
        }
        Ok(found)
    }

    /// The processes of a role.
    pub(super) fn find(&self, role: Role) -> Result<Vec<Process>> {
        let mut processes = self.processes()?;
        processes.retain(|process| process.is(role));
        Ok(processes)
    }

    /// Sends a signal to the processes of a role and returns how many there were.
    pub(super) fn signal(&self, role: Role, signal: Signal) -> Result<usize> {
        let mut sent = 0;
        for process in self.find(role)? {
            sent += usize::from(self.signal_process(&process, role, signal).is_ok());
        }
        // nsenter stops with what it waits for.
        if role == Role::Node
            && signal == Signal::CONT
            && let Some(node) = &self.node
            && let Some(pid) = i32::try_from(node.id()).ok().and_then(Pid::from_raw)
        {
            let _ = rustix::process::kill_process(pid, signal);
        }
        Ok(sent)
    }

    fn signal_process(&self, process: &Process, role: Role, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(process.pid).context("a process id is positive")?;
        let held = pidfd_open(pid, PidfdFlags::empty())?;
        // The id may have gone to another process since; what is held now can't change.
        ensure!(self.find(role)?.iter().any(|found| found.pid == process.pid), "it ended");
        Ok(pidfd_send_signal(held, signal)?)
    }

    /// Fills the disk to its last block.
    pub(super) fn fill_disk(&self) -> Result<()> {
        let path = self.ballast();
        let file = File::options().create(true).append(true).open(&path)?;
        let mut step = DISK_BYTES;
        while step >= 4096 {
            let length = file.metadata()?.len();
            let flags = rustix::fs::FallocateFlags::empty();
            match rustix::fs::fallocate(&file, flags, length, step) {
                Ok(()) => {}
                Err(rustix::io::Errno::NOSPC) => step /= 2,
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot fill {}", path.display()));
                }
            }
        }
        Ok(())
    }

    /// Takes away what filled the disk.
    pub(super) fn free_disk(&self) -> Result<()> {
        match fs::remove_file(self.ballast()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn ballast(&self) -> PathBuf {
        self.data("../ballast")
    }

    /// Ends all of trine on the host, in order, and says what is left running.
    pub(super) fn stop(&mut self) -> Result<()> {
        self.trine(&["stop", "--guests"], None)?;
        self.reap();
        let left = self.processes()?;
        if !left.is_empty() {
            bail!("after trine stop --guests these run on {}: {left:?}", self.name);
        }
        Ok(())
    }

    /// Copies the logs of the data directory out, for a look after the host is gone.
    pub(super) fn keep_logs(&self) {
        let Ok(entries) = fs::read_dir(self.data("log")) else { return };
        for entry in entries.flatten() {
            let _ = fs::copy(entry.path(), self.directory.join(entry.file_name()));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.keep_logs();
        self.anchor.take();
        // The first process ends at the end of its pipe and takes all others with it.
        let _ = self.namespaces.wait();
        self.reap();
    }
}

/// Runs a command that must succeed.
pub(super) fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}", message.trim());
    Ok(())
}
