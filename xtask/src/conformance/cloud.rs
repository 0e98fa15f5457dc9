//! A cloud of three nodes for a suite: `trine up`, in a directory that is removed afterwards.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::shell;

/// A running cloud; ends with the value.
pub(super) struct Cloud {
    process: Child,
    trine: PathBuf,
    directory: PathBuf,
    keep: bool,
}

impl Cloud {
    /// Builds the product and starts three nodes.
    pub(super) fn start(keep: bool, release: bool) -> Result<Cloud> {
        let mut build = shell::cargo();
        build.args(["build", "--locked", "--package", "node"]);
        if release {
            build.arg("--release");
        }
        shell::run(&mut build)?;
        let profile = if release { "release" } else { "debug" };
        let trine = shell::target_directory().join(profile).join("trine");
        let directory =
            std::env::temp_dir().join(format!("trine-conformance-{}", std::process::id()));
        let third = std::process::id() % 127 * 2;
        let process = Command::new(&trine)
            .args(["up", "--addresses", &format!("127.76.{third}"), "--directory"])
            .arg(&directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", trine.display()))?;
        let mut cloud = Cloud { process, trine, directory, keep };
        cloud.wait_until_ready()?;
        Ok(cloud)
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let output = self.process.stdout.take().context("its output is piped")?;
        let mut lines = BufReader::new(output).lines();
        for line in lines.by_ref() {
            let line = line?;
            println!("  {line}");
            if line == "trine up ready" {
                std::thread::spawn(move || lines.for_each(drop));
                return Ok(());
            }
        }
        bail!("trine up ended before the cloud was ready")
    }

    /// Data directory of the first node, with `clouds.yaml`.
    pub(super) fn first_node(&self) -> PathBuf {
        self.directory.join("node1")
    }

    /// A scratch directory that goes with the cloud.
    pub(super) fn scratch(&self) -> &Path {
        &self.directory
    }

    /// The product's executable.
    pub(super) fn trine(&self) -> &Path {
        &self.trine
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        // Killing `up` first, so that it does not see its nodes end.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let third = std::process::id() % 127 * 2;
        let down = Command::new(&self.trine)
            .args(["up", "--down", "--addresses", &format!("127.76.{third}"), "--directory"])
            .arg(&self.directory)
            .status();
        if !down.is_ok_and(|status| status.success()) {
            eprintln!("the cloud in {} did not end cleanly", self.directory.display());
        } else if self.keep {
            println!("kept: {}", self.directory.display());
        } else if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            eprintln!("cannot remove {}: {error}", self.directory.display());
        }
    }
}
