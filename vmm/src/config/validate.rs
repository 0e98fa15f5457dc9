//! The rules a configuration keeps, checked once; each broken rule is one line that names the
//! key, the value and what would be right.

use super::{
    BalloonConfig, DiskConfig, HugePages, NetConfig, RateLimits, Resource, VmConfig, VsockConfig,
};
use crate::devices::blk::QUEUES_MAX;
use crate::devices::{balloon, rng, vsock};
use crate::machine::VCPUS_MAX;
use crate::machine::boot::CMDLINE_BYTES_MAX;
use crate::machine::memory::{HUGE_PAGE_MIB, MEMORY_MIB_MAX, MEMORY_MIB_MIN};
use abi::boot::PCI_SLOTS;
use std::collections::BTreeSet;
use std::path::Path;

/// Most bytes of a configuration file.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// Most bytes of an id, nonce or serial.
const NAME_BYTES_MAX: usize = 128;
/// Most devices: slot 0 is the host bridge.
pub(crate) const DEVICES_MAX: usize = PCI_SLOTS - 1;
/// Smallest context id of a guest: those below have meanings of their own.
const CID_MIN: u32 = 3;
/// Largest console ring file.
pub(crate) const CONSOLE_BYTES_MAX: u64 = 1 << 30;

impl VmConfig {
    /// Reads a configuration file for the standalone form and checks it, the host included.
    pub fn read(path: &Path) -> Result<VmConfig, Vec<String>> {
        let name = path.display();
        let size = std::fs::metadata(path).map_err(|error| vec![format!("{name}: {error}")])?.len();
        if size > CONFIG_BYTES_MAX {
            return Err(vec![format!("{name}: {size} bytes; at most {CONFIG_BYTES_MAX} are read")]);
        }
        let text =
            std::fs::read_to_string(path).map_err(|error| vec![format!("{name}: {error}")])?;
        let config: VmConfig =
            serde_json::from_str(&text).map_err(|error| vec![format!("{name}: {error}")])?;
        let mut problems = config.problems();
        problems.extend(config.missing_files());
        if let Some(host_mib) = host_memory_mib()
            && u64::from(config.memory_mib) > host_mib
        {
            problems.push(format!(
                "memory_mib: {} is more than this host has ({host_mib} MiB)",
                config.memory_mib
            ));
        }
        if problems.is_empty() {
            Ok(config)
        } else {
            Err(problems.into_iter().map(|problem| format!("{name}: {problem}")).collect())
        }
    }

    /// Every rule this configuration breaks, whatever the host.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut rule = |holds: bool, problem: String| {
            if !holds {
                problems.push(problem);
            }
        };
        rule(
            self.version == 1,
            format!("version: {} is not known; this VMM reads 1", self.version),
        );
        rule(!self.id.is_empty(), "id: it must not be empty".into());
        for (key, value) in [("id", &self.id), ("nonce", &self.nonce)] {
            rule(
                value.len() <= NAME_BYTES_MAX,
                format!("{key}: {} bytes; at most {NAME_BYTES_MAX}", value.len()),
            );
        }
        rule(self.vcpus >= 1, "vcpus: 0; a guest needs at least 1".into());
        rule(self.vcpus <= VCPUS_MAX, format!("vcpus: {}; at most {VCPUS_MAX}", self.vcpus));
        rule(
            (MEMORY_MIB_MIN..=MEMORY_MIB_MAX).contains(&self.memory_mib),
            format!("memory_mib: {}; from {MEMORY_MIB_MIN} to {MEMORY_MIB_MAX}", self.memory_mib),
        );
        rule(
            self.huge_pages != HugePages::Reserved || self.memory_mib.is_multiple_of(HUGE_PAGE_MIB),
            format!(
                "memory_mib: {}; a multiple of {HUGE_PAGE_MIB} with reserved huge pages",
                self.memory_mib
            ),
        );
        let cmdline = self.boot.cmdline.len();
        rule(
            cmdline <= CMDLINE_BYTES_MAX,
            format!("boot.cmdline: {cmdline} bytes; at most {CMDLINE_BYTES_MAX}"),
        );
        rule(
            !self.boot.cmdline.contains('\0'),
            "boot.cmdline: a zero byte would end it early; leave it out".into(),
        );
        if let Some(console) = &self.console {
            rule(
                (4096..=CONSOLE_BYTES_MAX).contains(&console.capacity_bytes),
                format!(
                    "console.capacity_bytes: {}; from 4096 to {CONSOLE_BYTES_MAX}",
                    console.capacity_bytes
                ),
            );
        }
        let devices = self.device_ids().count();
        rule(
            devices <= DEVICES_MAX,
            format!("disks, nets and other devices: {devices}; at most {DEVICES_MAX} together"),
        );
        problems.extend(self.device_problems());
        problems
    }

    fn device_problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut ids = BTreeSet::new();
        for id in self.device_ids() {
            if !ids.insert(id) {
                problems.push(format!("device id {id:?} is used twice"));
            }
        }
        problems.extend(self.disks.iter().filter_map(DiskConfig::problem));
        problems.extend(self.nets.iter().filter_map(NetConfig::problem));
        if self.rng.as_ref().is_some_and(|rng| rng.bytes_per_second == 0) {
            problems.push("rng.bytes_per_second: 0; it gives at least 1".into());
        }
        problems.extend(self.vsock.as_ref().and_then(VmConfig::vsock_problem));
        problems.extend(self.balloon.as_ref().and_then(|balloon| self.balloon_problem(balloon)));
        problems
    }

    fn device_ids(&self) -> impl Iterator<Item = &str> {
        let disks = self.disks.iter().map(|disk| disk.id.as_str());
        let nets = self.nets.iter().map(|net| net.id.as_str());
        let others = [
            self.rng.as_ref().map(|_| rng::ID),
            self.balloon.as_ref().map(|_| balloon::ID),
            self.vsock.as_ref().map(|_| vsock::ID),
        ];
        disks.chain(nets).chain(others.into_iter().flatten())
    }

    fn vsock_problem(vsock: &VsockConfig) -> Option<String> {
        let by_path = matches!(vsock.socket, Resource::Path(_));
        if vsock.cid < CID_MIN || vsock.cid == u32::MAX {
            return Some(format!("vsock.cid: {}; from {CID_MIN} to {}", vsock.cid, u32::MAX - 1));
        }
        (by_path && vsock.connector.is_some()).then(|| {
            "vsock.connector: it goes with a descriptor; a path is connected by itself".into()
        })
    }

    fn balloon_problem(&self, balloon: &BalloonConfig) -> Option<String> {
        if self.huge_pages == HugePages::Reserved {
            return Some(
                "balloon: reserved huge pages can't be given back; leave one of the two out".into(),
            );
        }
        balloon_target_problem(balloon.target_mib, self.memory_mib)
            .map(|problem| format!("balloon.target_mib: {problem}"))
    }

    fn missing_files(&self) -> Vec<String> {
        let disks = self.disks.iter().enumerate().filter_map(|(index, disk)| match &disk.source {
            super::DiskSource::Raw(file) => Some((format!("disks[{index}].source.raw"), file)),
            super::DiskSource::Nbd { .. } => None,
        });
        let mut problems: Vec<String> =
            std::iter::once(("boot.kernel".to_string(), &self.boot.kernel))
                .chain(self.boot.initrd.iter().map(|initrd| ("boot.initrd".to_string(), initrd)))
                .chain(disks)
                .filter_map(|(key, resource)| match resource {
                    Resource::Path(path) if !path.exists() => {
                        Some(format!("{key}: {} does not exist", path.display()))
                    }
                    _ => None,
                })
                .collect();
        let sockets = [
            ("control", self.control.as_ref()),
            ("vsock.socket", self.vsock.as_ref().map(|vsock| &vsock.socket)),
        ];
        for (key, socket) in sockets {
            if let Some(Resource::Path(path)) = socket
                && path.symlink_metadata().is_ok()
            {
                problems.push(format!(
                    "{key}: {} exists; another guest may be using it, remove it if none is",
                    path.display()
                ));
            }
        }
        problems
    }
}

/// The rule that a balloon's target breaks, if any.
pub fn balloon_target_problem(target_mib: u32, memory_mib: u32) -> Option<String> {
    (target_mib > memory_mib)
        .then(|| format!("{target_mib}; at most the guest's memory, {memory_mib}"))
}

fn id_problem(id: &str) -> Option<String> {
    let fits = (1..=NAME_BYTES_MAX).contains(&id.len());
    (!fits).then(|| format!("device id {id:?}: from 1 to {NAME_BYTES_MAX} bytes"))
}

impl RateLimits {
    /// The rule these limits break, if any.
    pub fn problem(&self) -> Option<String> {
        let named = [("operations", &self.operations), ("bytes", &self.bytes)];
        named.into_iter().find_map(|(name, bucket)| {
            let bucket = bucket.as_ref()?;
            if bucket.per_second == 0 {
                return Some(format!("{name}.per_second: 0; at least 1, or leave {name} out"));
            }
            (bucket.burst == Some(0)).then(|| format!("{name}.burst: 0; at least 1"))
        })
    }
}

impl DiskConfig {
    /// The rule this device breaks, if any.
    pub fn problem(&self) -> Option<String> {
        let len = self.serial.len();
        let serial = (len > NAME_BYTES_MAX).then(|| {
            format!("disk {:?}: serial of {len} bytes; at most {NAME_BYTES_MAX}", self.id)
        });
        let queues = (!(1..=QUEUES_MAX).contains(&self.queues)).then(|| {
            format!("disk {:?}: queues: {}; from 1 to {QUEUES_MAX}", self.id, self.queues)
        });
        let limits =
            self.limits.problem().map(|problem| format!("disk {:?}: limits.{problem}", self.id));
        id_problem(&self.id).or(serial).or(queues).or(limits)
    }
}

impl NetConfig {
    /// The MAC address as bytes.
    pub fn mac_bytes(&self) -> Option<[u8; 6]> {
        let mut bytes = [0u8; 6];
        let mut parts = self.mac.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2)?;
            *byte = u8::from_str_radix(part, 16).ok()?;
        }
        (parts.next().is_none() && bytes[0] & 1 == 0 && bytes != [0; 6]).then_some(bytes)
    }

    /// The rule this device breaks, if any.
    pub fn problem(&self) -> Option<String> {
        if let Some(problem) = id_problem(&self.id) {
            return Some(problem);
        }
        if self.mac_bytes().is_none() {
            return Some(format!(
                "net {:?}: mac {:?} is not a unicast address like fa:16:3e:00:00:01",
                self.id, self.mac
            ));
        }
        if !(68..=1946).contains(&self.mtu) {
            return Some(format!("net {:?}: mtu {}; from 68 to 1946", self.id, self.mtu));
        }
        let problem = |key: &str, limits: &RateLimits| {
            limits.problem().map(|problem| format!("net {:?}: {key}.{problem}", self.id))
        };
        problem("from_guest", &self.from_guest).or_else(|| problem("to_guest", &self.to_guest))
    }
}

/// RAM of the host, MiB.
fn host_memory_mib() -> Option<u64> {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).checked_mul(u64::from(info.mem_unit)).map(|bytes| bytes >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(change: &str) -> Vec<String> {
        let mut json: serde_json::Value = serde_json::json!({
            "version": 1, "id": "a", "memory_mib": 64, "boot": {"kernel": {"path": "/nonexistent"}}
        });
        let change: serde_json::Value = serde_json::from_str(change).unwrap();
        json.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        match serde_json::from_value::<VmConfig>(json) {
            Ok(config) => config.problems(),
            Err(error) => vec![error.to_string()],
        }
    }

    #[test]
    fn each_broken_rule_is_named_with_its_key() {
        assert_eq!(config("{}"), Vec::<String>::new());
        for (change, key) in [
            (r#"{"version": 2}"#, "version"),
            (r#"{"vcpus": 0}"#, "vcpus"),
            (r#"{"memory_mib": 8}"#, "memory_mib"),
            (r#"{"memory_mib": 70000000}"#, "memory_mib"),
            (r#"{"memory_mib": 65, "huge_pages": "reserved"}"#, "memory_mib: 65"),
            (r#"{"huge_pages": "large"}"#, "large"),
            (r#"{"colour": "red"}"#, "colour"),
            (r#"{"id": ""}"#, "id"),
            (
                r#"{"console": {"file": {"path": "c"}, "capacity_bytes": 0}}"#,
                "console.capacity_bytes",
            ),
            (
                r#"{"nets": [{"id": "n", "mac": "01:00:00:00:00:00", "backend": {"ring": [0, 1, 2]}}]}"#,
                "mac",
            ),
            (
                r#"{"nets": [{"id": "n", "mac": "fa:16:3e:00:00:01", "mtu": 9000, "backend": {"ring": [0, 1, 2]}}]}"#,
                "mtu",
            ),
            (
                r#"{"disks": [{"id": "d", "source": {"raw": {"path": "x"}}}, {"id": "d", "source": {"raw": {"path": "y"}}}]}"#,
                "used twice",
            ),
            (r#"{"rng": {"bytes_per_second": 0}}"#, "rng.bytes_per_second"),
            (
                r#"{"disks": [{"id": "d", "source": {"raw": {"path": "x"}}, "queues": 17}]}"#,
                "queues: 17; from 1 to 16",
            ),
            (
                r#"{"disks": [{"id": "d", "source": {"raw": {"path": "x"}}, "engine": "fast"}]}"#,
                "fast",
            ),
            (
                r#"{"disks": [{"id": "d", "source": {"raw": {"path": "x"}}, "limits": {"bytes": {"per_second": 0}}}]}"#,
                "limits.bytes.per_second: 0; at least 1",
            ),
            (
                r#"{"nets": [{"id": "n", "mac": "fa:16:3e:00:00:01", "backend": {"ring": [0, 1, 2]}, "to_guest": {"operations": {"per_second": 5, "burst": 0}}}]}"#,
                "to_guest.operations.burst: 0",
            ),
            (r#"{"rng": {"bytes": 1}}"#, "bytes"),
            (r#"{"balloon": {"target_mib": 65}}"#, "balloon.target_mib: 65; at most"),
            (r#"{"vsock": {"cid": 2, "socket": {"path": "v"}}}"#, "vsock.cid: 2; from 3"),
            (
                r#"{"vsock": {"cid": 3, "socket": {"path": "v"}, "connector": 1}}"#,
                "vsock.connector: it goes with a descriptor",
            ),
            (r#"{"balloon": {}, "huge_pages": "reserved"}"#, "balloon: reserved huge pages"),
            (
                r#"{"balloon": {}, "nets": [{"id": "balloon", "mac": "fa:16:3e:00:00:01", "backend": {"ring": [0, 1, 2]}}]}"#,
                "\"balloon\" is used twice",
            ),
        ] {
            let problems = config(change);
            assert!(problems.len() == 1 && problems[0].contains(key), "{change}: {problems:?}");
        }
    }
}
