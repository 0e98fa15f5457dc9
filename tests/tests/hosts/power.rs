//! The end of a machine's power, and its next boot: all of its processes end at once, and what they
//! left on disk is of another boot of the kernel than the one that finds it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::{Host, PATIENCE};

impl Host {
    /// Ends every process of this host at once, and makes what is on its disk an earlier boot's.
    pub(crate) fn lose_power(&mut self) -> Result<()> {
        let all = self.processes()?;
        self.kill_node()?;
        let pid = |pid: &u32| Pid::from_raw(i32::try_from(*pid).ok()?);
        for pid in all.iter().filter_map(pid) {
            // Those whose parent is gone already may be, too.
            let _ = kill_process(pid, Signal::KILL);
        }
        let started = Instant::now();
        while !self.processes()?.is_empty() {
            ensure!(started.elapsed() < PATIENCE, "{} still runs: {all:?}", self.name);
            std::thread::sleep(Duration::from_millis(20));
        }
        self.age_what_is_on_disk()
    }

    /// Processes that run this host's programs or work on its data directory.
    fn processes(&self) -> Result<Vec<u32>> {
        let data = self.data.as_os_str().as_encoded_bytes();
        let names_data = |bytes: &[u8]| bytes.windows(data.len()).any(|part| part == data);
        let belongs = |process: &Path| {
            let executable = fs::read_link(process.join("exe")).unwrap_or_default();
            let command = fs::read(process.join("cmdline")).unwrap_or_default();
            executable.starts_with(&self.data) || names_data(&command)
        };
        let own = std::process::id();
        let pids = fs::read_dir("/proc")?.filter_map(|entry| {
            let path = entry.ok()?.path();
            let pid: u32 = path.file_name()?.to_str()?.parse().ok()?;
            (pid != own && !is_zombie(&path) && belongs(&path)).then_some(pid)
        });
        Ok(pids.collect())
    }

    /// How many processes run that the spawner made, and the spawner itself.
    pub(crate) fn vmm_processes(&self) -> Result<usize> {
        let pids = self.processes()?;
        let executable = |pid: &&u32| {
            let executable = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            executable.starts_with(&self.data)
        };
        Ok(pids.iter().filter(executable).count())
    }

    fn age_what_is_on_disk(&self) -> Result<()> {
        let another: [u8; 16] = [9; 16];
        for record in self.guest_records()?.into_iter().chain(json_files(&self.data.join("run"))?) {
            rewrite(&record, "boot_id", json!(another))?;
        }
        let storage = self.data.join("storage/storage.json");
        rewrite(&storage, "boot_id", json!("00000000-0000-4000-8000-000000000009"))?;
        for entry in fs::read_dir(&self.data)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().as_encoded_bytes();
            if name.starts_with(b"lease-") {
                fs::rename(&path, self.data.join("lease-09"))?;
            }
        }
        Ok(())
    }

    /// The records of the guests on its disk.
    pub(crate) fn guest_records(&self) -> Result<Vec<PathBuf>> {
        let guests = fs::read_dir(self.data.join("guests"))?;
        let records = guests.map(|entry| Ok(entry?.path().join("guest.json")));
        Ok(records.collect::<Result<Vec<_>>>()?.into_iter().filter(|path| path.exists()).collect())
    }
}

fn is_zombie(process: &Path) -> bool {
    let stat = fs::read_to_string(process.join("stat")).unwrap_or_default();
    stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('Z'))
}

fn json_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let paths = fs::read_dir(directory)?.map(|entry| Ok(entry?.path()));
    let paths = paths.collect::<Result<Vec<_>>>()?;
    Ok(paths.into_iter().filter(|path| path.extension().is_some_and(|e| e == "json")).collect())
}

/// Changes a field that must be there.
pub(crate) fn rewrite(path: &Path, field: &str, value: Value) -> Result<()> {
    let mut record: Value = serde_json::from_slice(&fs::read(path)?)?;
    let found = record.get_mut(field).with_context(|| format!("{field} in {}", path.display()))?;
    *found = value;
    Ok(fs::write(path, serde_json::to_vec(&record)?)?)
}
