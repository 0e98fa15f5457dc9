use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// How a cloud is started and what stays of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Leaves its directory for a look afterwards.
    pub keep: bool,
}

/// A cloud of three nodes (`trine up`), which ends with the value.
pub struct Cloud {
    trine: PathBuf,
    directory: PathBuf,
    addresses: String,
    options: Options,
    process: Option<Child>,
}

impl Cloud {
    /// Starts a new one in a directory of its own, on loopback addresses of this process.
    pub fn start(trine: &Path, options: Options) -> Result<Cloud> {
        let id = std::process::id();
        let mut cloud = Cloud {
            trine: trine.to_path_buf(),
            directory: std::env::temp_dir().join(format!("trine-test-{id}")),
            addresses: format!("127.{}.{}", 210 + id / 127 % 40, id % 127 * 2),
            options,
            process: None,
        };
        cloud.up()?;
        Ok(cloud)
    }

    /// Starts the nodes (again).
    pub fn up(&mut self) -> Result<()> {
        let mut process = self
            .command(&["--leave-guests"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", self.trine.display()))?;
        let output = process.stdout.take().context("its output is piped")?;
        self.process = Some(process);
        let mut lines = BufReader::new(output).lines();
        for line in lines.by_ref() {
            let line = line?;
            println!("  {line}");
            if line == "trine up ready" {
                // Whatever it prints later must not fill the pipe.
                std::thread::spawn(move || lines.for_each(drop));
                return Ok(());
            }
        }
        bail!("trine up ended before the cloud was ready; see its messages above")
    }

    /// Ends the node processes as Ctrl-C does; guests, switches and storage go on.
    pub fn stop_nodes(&mut self) -> Result<()> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        let pid = process.id().to_string();
        Command::new("kill").args(["-INT", &pid]).status()?;
        let status = process.wait()?;
        if !status.success() {
            bail!("trine up ended with {status}");
        }
        Ok(())
    }

    fn command(&self, options: &[&str]) -> Command {
        let mut command = Command::new(&self.trine);
        command.arg("up").args(options).args(["--addresses", &self.addresses, "--directory"]);
        command.arg(&self.directory);
        command
    }

    /// The product's executable.
    pub fn trine(&self) -> &Path {
        &self.trine
    }

    /// The directory of all nodes; files may be added, they go with the cloud.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Data directory of a node, 1 to 3.
    pub fn node(&self, number: usize) -> PathBuf {
        self.directory.join(format!("node{number}"))
    }

    /// Host and port of a node's API.
    pub fn api_address(&self, number: usize) -> String {
        format!("{}.{number}:8774", self.addresses)
    }

    /// `credentials.json` of the first node.
    pub fn credentials(&self) -> Result<Value> {
        let text = std::fs::read(self.node(1).join("credentials.json"))?;
        Ok(serde_json::from_slice(&text)?)
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        if let Err(error) = self.stop_nodes() {
            eprintln!("{error:#}");
        }
        let down = self.command(&["--down"]).status();
        if !down.is_ok_and(|status| status.success()) {
            eprintln!("the cloud in {} did not end cleanly", self.directory.display());
        } else if self.options.keep || std::thread::panicking() {
            eprintln!("kept for a look: {}", self.directory.display());
        } else if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            eprintln!("cannot remove {}: {error}", self.directory.display());
        }
    }
}
