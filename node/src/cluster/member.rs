use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};

/// How long a node may take from its start to serving.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// One node of a local cluster, as a process.
pub(crate) struct Member {
    /// `node1` …
    pub(crate) name: String,
    /// Its loopback address.
    pub(crate) address: String,
    /// Its data directory.
    pub(crate) data_directory: PathBuf,
    log: PathBuf,
    process: Option<Child>,
}

impl Member {
    pub(super) fn new(name: String, address: String, directory: &Path) -> Member {
        let data_directory = directory.join(&name);
        let log = directory.join(format!("{name}.log"));
        Member { name, address, data_directory, log, process: None }
    }

    pub(super) fn is_made(&self) -> bool {
        self.data_directory.join("node.toml").exists()
    }

    /// Whether its node process was started by us and has not been ended by us.
    pub(crate) fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// Where its API answers.
    pub(crate) fn api_address(&self) -> String {
        format!("{}:8774", self.address)
    }

    /// Runs a `trine` command on this member's data directory and returns what it printed.
    pub(crate) async fn trine(&self, arguments: &[&str], input: Option<&str>) -> Result<String> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(arguments)
            .arg("--data-dir")
            .arg(&self.data_directory)
            .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        if let (Some(mut pipe), Some(input)) = (child.stdin.take(), input) {
            pipe.write_all(input.as_bytes()).await?;
        }
        let output = child.wait_with_output().await?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr);
            bail!("trine {} on {}: {}", arguments[0], self.name, message.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// `trine status --json`.
    pub(crate) async fn status(&self) -> Result<Value> {
        let text = self.trine(&["status", "--json"], None).await?;
        serde_json::from_str(&text).context("trine status printed no JSON")
    }

    /// Starts `trine node` and waits until it serves.
    pub(crate) async fn start(&mut self) -> Result<()> {
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut child = Command::new(std::env::current_exe()?)
            .arg("node")
            .arg("--data-dir")
            .arg(&self.data_directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            // A Ctrl-C at the terminal is for us: we end the nodes in order.
            .process_group(0)
            .spawn()?;
        let output = child.stdout.take().context("the node's output is piped")?;
        let mut lines = BufReader::new(output).lines();
        let ready = async {
            while let Some(line) = lines.next_line().await? {
                if line.starts_with("trine node ready") {
                    return Ok(true);
                }
            }
            Ok::<bool, std::io::Error>(false)
        };
        let ready = tokio::time::timeout(READY_WITHIN, ready).await;
        self.process = Some(child);
        match ready {
            Ok(Ok(true)) => {
                // Whatever it prints later must not fill the pipe.
                tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
                Ok(())
            }
            Ok(_) => bail!("{} ended before it served:\n{}", self.name, self.log_tail().await),
            Err(_) => bail!(
                "{} does not serve after {} s:\n{}",
                self.name,
                READY_WITHIN.as_secs(),
                self.log_tail().await
            ),
        }
    }

    async fn log_tail(&self) -> String {
        let mut text = String::new();
        if let Ok(mut file) = tokio::fs::File::open(&self.log).await {
            let _ = file.read_to_string(&mut text).await;
        }
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }

    /// SIGKILL to the node process, as a crash would end it.
    pub(crate) async fn kill(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            process.kill().await?;
        }
        Ok(())
    }

    /// SIGTERM to the node process alone.
    pub(crate) async fn terminate(&mut self) -> Result<()> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        if let Some(pid) = process.id().and_then(|id| i32::try_from(id).ok()) {
            let pid = rustix::process::Pid::from_raw(pid).context("a process id is positive")?;
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        }
        process.wait().await?;
        Ok(())
    }

    /// Ends the node and all that it started.
    pub(crate) async fn end(&mut self) -> Result<()> {
        if !self.is_made() {
            return Ok(());
        }
        self.trine(&["stop", "--guests"], None).await?;
        if let Some(mut process) = self.process.take() {
            process.wait().await?;
        }
        Ok(())
    }

    /// Removes the data directory and the log.
    pub(crate) fn remove(&self) -> std::io::Result<()> {
        if self.data_directory.exists() {
            fs::remove_dir_all(&self.data_directory)?;
        }
        if self.log.exists() { fs::remove_file(&self.log) } else { Ok(()) }
    }
}
