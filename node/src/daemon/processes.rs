//! The switch and the storage process of this host: started detached, found again after a restart
//! of the node, started again where they die. They outlive the node.
//!
//! ```text
//! asked ── answers ──► held ── ends ──┐
//!   │                                 │
//!   └─ silent ─► started ─ answers ─► held
//!        ▲                            │
//!        └────────── backoff ◄────────┘
//! ```

use crate::data_directory::DataDirectory;
use crate::process::{Held, ProcessRecord};
use crate::process_end::process_end;
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// How long a process may take from its start to its first answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// A process that lived this long has earned the shortest backoff.
const STABLE_AFTER: Duration = Duration::from_secs(30);

/// A process to keep running.
pub(crate) struct Supervised {
    /// `switch` or `storage`: the subcommand, and the name of its record and log.
    pub(crate) name: &'static str,
    /// Its TOML configuration.
    pub(crate) config: String,
    /// Its control socket.
    pub(crate) socket: PathBuf,
    /// Asks it who it is: its process id.
    pub(crate) ask: fn(&Path) -> Result<u32>,
    /// Fails where a port that it will bind is taken.
    pub(crate) check: Box<dyn Fn() -> Result<()> + Send + Sync>,
    directory: DataDirectory,
    pid: AtomicU32,
}

impl Supervised {
    /// A process of a data directory.
    pub(crate) fn new(
        directory: &DataDirectory,
        name: &'static str,
        config: String,
        socket: PathBuf,
        ask: fn(&Path) -> Result<u32>,
        check: Box<dyn Fn() -> Result<()> + Send + Sync>,
    ) -> Arc<Supervised> {
        let directory = directory.clone();
        Arc::new(Supervised { name, config, socket, ask, check, directory, pid: AtomicU32::new(0) })
    }

    /// The process id, where it runs.
    pub(crate) fn pid(&self) -> Option<u32> {
        Some(self.pid.load(Ordering::Relaxed)).filter(|pid| *pid != 0)
    }

    /// Finds or starts it; returns it held once it answers.
    pub(crate) async fn ensure(self: &Arc<Self>) -> Result<Held> {
        let this = Arc::clone(self);
        tokio::task::spawn_blocking(move || this.ensure_blocking()).await?
    }

    fn ensure_blocking(&self) -> Result<Held> {
        if let Ok(pid) = (self.ask)(&self.socket) {
            return self.hold(pid);
        }
        // One that holds our locks and ports and does not answer would only be in the way.
        let record = ProcessRecord::read(&self.directory.process_record(self.name));
        if let Some(hung) = record.and_then(|record| record.hold())
            && !self.answers_soon(&hung)
        {
            tracing::warn!(process = self.name, "it does not answer and is ended");
            hung.end(Duration::from_secs(2));
        }
        if let Ok(pid) = (self.ask)(&self.socket) {
            return self.hold(pid);
        }
        (self.check)()?;
        let mut child = self.start()?;
        let pid = self.wait_for_answer(&mut child)?;
        // Reaps it when it ends while this node lives; afterwards init does.
        std::thread::spawn(move || child.wait());
        self.hold(pid)
    }

    /// It may just be starting.
    fn answers_soon(&self, process: &Held) -> bool {
        let until = Instant::now() + Duration::from_secs(3);
        while Instant::now() < until {
            if (self.ask)(&self.socket).is_ok() {
                return true;
            }
            if process.wait(Duration::from_millis(50)) {
                return true;
            }
        }
        false
    }

    fn hold(&self, pid: u32) -> Result<Held> {
        let record = ProcessRecord::of(pid)
            .with_context(|| format!("the {} process {pid} ended at once", self.name))?;
        record.write(&self.directory.process_record(self.name))?;
        self.pid.store(pid, Ordering::Relaxed);
        record.hold().with_context(|| format!("the {} process {pid} ended at once", self.name))
    }

    fn start(&self) -> Result<Child> {
        let config = self.directory.join("run").join(format!("{}.toml", self.name));
        crate::files::replace(&config, self.config.as_bytes())
            .with_context(|| format!("cannot write {}", config.display()))?;
        let log = self.log_path();
        let log = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("cannot open {}", log.display()))?;
        let program = std::env::current_exe().context("cannot tell this program's file")?;
        let child = Command::new(program)
            .arg(self.name)
            .arg("--detached")
            .arg("--config")
            .arg(&config)
            .current_dir(self.directory.root())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start the {} process", self.name))?;
        ProcessRecord::of(child.id())
            .and_then(|record| record.write(&self.directory.process_record(self.name)))
            .with_context(|| format!("cannot record the {} process", self.name))?;
        Ok(child)
    }

    fn log_path(&self) -> PathBuf {
        self.directory.join("log").join(format!("{}.log", self.name))
    }

    fn wait_for_answer(&self, child: &mut Child) -> Result<u32> {
        let until = Instant::now() + ANSWER_WITHIN;
        loop {
            if let Some(status) = child.try_wait()? {
                bail!("the {} process ended with {status}: {}", self.name, self.last_log_line());
            }
            match (self.ask)(&self.socket) {
                Ok(pid) => return Ok(pid),
                Err(error) if Instant::now() > until => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(error).with_context(|| {
                        format!(
                            "the {} process did not answer in {} s; see {}",
                            self.name,
                            ANSWER_WITHIN.as_secs(),
                            self.log_path().display()
                        )
                    });
                }
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    fn last_log_line(&self) -> String {
        let text = std::fs::read(self.log_path()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text[text.len().saturating_sub(4096)..]).into_owned();
        text.lines().last().unwrap_or("it logged nothing").to_owned()
    }

    /// Holds the process until the node stops, starting it again where it ends.
    pub(crate) async fn keep(
        self: Arc<Self>,
        mut held: Held,
        restarted: impl Fn(),
        mut stopping: watch::Receiver<bool>,
    ) {
        let mut backoff = BACKOFF_MIN;
        loop {
            let since = Instant::now();
            tokio::select! {
                _ = ended(&held) => {}
                _ = stopping.wait_for(|stopping| *stopping) => return,
            }
            self.pid.store(0, Ordering::Relaxed);
            tracing::error!(process = self.name, "it ended and is started again");
            if since.elapsed() > STABLE_AFTER {
                backoff = BACKOFF_MIN;
            }
            held = loop {
                tokio::select! {
                    () = tokio::time::sleep(backoff) => {}
                    _ = stopping.wait_for(|stopping| *stopping) => return,
                }
                backoff = (backoff * 2).min(BACKOFF_MAX);
                match self.ensure().await {
                    Ok(held) => break held,
                    Err(error) => tracing::error!(process = self.name, "{error:#}"),
                }
            };
            restarted();
        }
    }
}

/// Waits until a held process has ended.
async fn ended(held: &Held) {
    let ended = async { process_end(held.pidfd().try_clone()?).await };
    if let Err(error) = ended.await {
        tracing::warn!(%error, "a process is looked at now and then instead of watched");
        while !held.has_ended() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}
