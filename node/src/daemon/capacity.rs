//! What this machine has to give to guests.

use crate::config::NodeConfig;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// vCPUs, memory, disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Capacity {
    /// Logical CPUs.
    pub(crate) vcpus: u32,
    /// Memory, MiB.
    pub(crate) ram_mib: u64,
    /// Disk, GiB.
    pub(crate) disk_gib: u64,
}

impl Capacity {
    /// What the configuration says, and of the machine what it leaves out.
    pub(crate) fn of_this_machine(config: &NodeConfig, data_directory: &Path) -> Capacity {
        let given = |value: u64| (value != 0).then_some(value);
        Capacity {
            vcpus: if config.vcpus != 0 { config.vcpus } else { logical_cpus() },
            ram_mib: given(config.ram_mib)
                .unwrap_or_else(|| memory_mib().saturating_sub(config.reserved_ram_mib).max(128)),
            disk_gib: given(config.disk_gib).unwrap_or_else(|| disk_gib(data_directory)),
        }
    }
}

impl From<Capacity> for controller::state::cluster::Capacity {
    fn from(capacity: Capacity) -> Self {
        let Capacity { vcpus, ram_mib, disk_gib } = capacity;
        Self { vcpus, ram_mib, disk_gib }
    }
}

fn logical_cpus() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
}

fn memory_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    mem_total_kib(&text).unwrap_or(0) / 1024
}

/// `MemTotal:       16384 kB` of proc(5).
fn mem_total_kib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn disk_gib(directory: &Path) -> u64 {
    // The directory itself may not be there yet.
    let existing = directory.ancestors().find(|path| path.exists());
    let statistics = rustix::fs::statvfs(existing.unwrap_or(Path::new("/")));
    statistics.map_or(0, |s| s.f_frsize.saturating_mul(s.f_blocks) >> 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_comes_before_the_machine() {
        let config = NodeConfig { vcpus: 7, ram_mib: 99, ..crate::config::example() };
        let capacity = Capacity::of_this_machine(&config, Path::new("/no/such/directory"));
        assert_eq!((capacity.vcpus, capacity.ram_mib), (7, 99));
        assert!(capacity.disk_gib > 0);
        let found = Capacity::of_this_machine(&crate::config::example(), Path::new("/"));
        assert!(found.vcpus > 0 && found.ram_mib > 0);
    }

    #[test]
    fn memory_is_read_from_meminfo() {
        let text = "MemFree: 1 kB\nMemTotal:       16384 kB\n";
        assert_eq!(mem_total_kib(text), Some(16384));
        assert_eq!(mem_total_kib("MemTotal: x"), None);
    }
}
