//! Numbers about a running guest, and their text for Prometheus.

use super::{RunState, Timings};
use crate::devices::counters::Counts;
use serde::{Deserialize, Serialize};
use std::fmt::Write;

/// What is measured of a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Metrics {
    /// Its id.
    pub id: String,
    /// State.
    pub state: RunState,
    /// Its memory, MiB.
    pub memory_mib: u32,
    /// Its vCPUs.
    pub vcpus: usize,
    /// CPU time of its process, nanoseconds.
    pub cpu_ns: u64,
    /// Launch times.
    pub timings: Timings,
    /// Its disks and network devices.
    pub devices: Vec<DeviceMetrics>,
}

/// What is measured of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceMetrics {
    /// Its id.
    pub id: String,
    /// `disk` or `net`.
    pub kind: String,
    /// What it did.
    pub counts: Counts,
    /// The guest was asked to let go of it.
    pub unplugging: bool,
}

/// A family: name, help, how a device's value is found.
type Family = (&'static str, &'static str, fn(&Counts) -> u64);

const FAMILIES: [Family; 6] = [
    ("reads_total", "Reads of a disk; frames given to the guest.", |counts| counts.reads),
    ("read_bytes_total", "Bytes of them.", |counts| counts.read_bytes),
    ("writes_total", "Changes of a disk; frames taken from the guest.", |counts| counts.writes),
    ("written_bytes_total", "Bytes of them.", |counts| counts.written_bytes),
    ("flushes_total", "Flushes of a disk.", |counts| counts.flushes),
    ("failures_total", "Requests that failed, frames that were lost.", |counts| counts.failures),
];

impl Metrics {
    /// Text in the exposition format of Prometheus (version 0.0.4).
    pub fn prometheus(&self) -> String {
        let mut text = String::new();
        let vm = label(&self.id);
        let mut gauge = |name: &str, kind: &str, help: &str, value: String| {
            family(&mut text, name, kind, help);
            let _ = writeln!(text, "trine_vmm_{name}{{vm=\"{vm}\"}} {value}");
        };
        let running = u8::from(self.state == RunState::Running);
        gauge("running", "gauge", "1 while the vCPUs run.", running.to_string());
        let memory_bytes = u64::from(self.memory_mib) << 20;
        gauge("memory_bytes", "gauge", "Memory of the guest.", memory_bytes.to_string());
        gauge("vcpus", "gauge", "vCPUs of the guest.", self.vcpus.to_string());
        gauge("cpu_seconds_total", "counter", "CPU time of the process.", seconds(self.cpu_ns));
        family(&mut text, "boot_seconds", "gauge", "From the request to a step of the launch.");
        for (step, ns) in self.timings.steps() {
            let since = ns.saturating_sub(self.timings.spawn_ns);
            let _ = writeln!(
                text,
                "trine_vmm_boot_seconds{{vm=\"{vm}\",step=\"{step}\"}} {}",
                seconds(since)
            );
        }
        let labels = |device: &DeviceMetrics| {
            format!("vm=\"{vm}\",device=\"{}\",kind=\"{}\"", label(&device.id), device.kind)
        };
        for (name, help, value) in FAMILIES {
            family(&mut text, &format!("device_{name}"), "counter", help);
            for device in &self.devices {
                let value = value(&device.counts);
                let _ = writeln!(text, "trine_vmm_device_{name}{{{}}} {value}", labels(device));
            }
        }
        let help = "1 while the guest is asked to let go of it.";
        family(&mut text, "device_unplugging", "gauge", help);
        for device in &self.devices {
            let value = u8::from(device.unplugging);
            let _ = writeln!(text, "trine_vmm_device_unplugging{{{}}} {value}", labels(device));
        }
        text
    }
}

fn family(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP trine_vmm_{name} {help}\n# TYPE trine_vmm_{name} {kind}");
}

fn seconds(ns: u64) -> String {
    format!("{}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000)
}

/// A label's value, escaped as the format wants it.
fn label(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_is_prometheus_and_labels_are_escaped() {
        let counts = Counts { reads: 3, read_bytes: 1536, ..Default::default() };
        let metrics = Metrics {
            id: "a\"b\\c\nd".into(),
            state: RunState::Running,
            memory_mib: 64,
            vcpus: 2,
            cpu_ns: 1_500_000_000,
            timings: Timings { spawn_ns: 10, main_ns: 2_000_010, ..Default::default() },
            devices: vec![DeviceMetrics {
                id: "root".into(),
                kind: "disk".into(),
                counts,
                unplugging: true,
            }],
        };
        let text = metrics.prometheus();
        let vm = r#"vm="a\"b\\c\nd""#;
        let disk = format!("{vm},device=\"root\",kind=\"disk\"");
        for line in [
            format!("trine_vmm_running{{{vm}}} 1"),
            format!("trine_vmm_memory_bytes{{{vm}}} 67108864"),
            format!("trine_vmm_cpu_seconds_total{{{vm}}} 1.500000000"),
            format!("trine_vmm_boot_seconds{{{vm},step=\"main\"}} 0.002000000"),
            format!("trine_vmm_device_reads_total{{{disk}}} 3"),
            format!("trine_vmm_device_unplugging{{{disk}}} 1"),
        ] {
            assert!(text.lines().any(|it| it == line), "{line} in {text}");
        }
        assert!(!text.contains("step=\"network\""), "what was not reached is not there");
        // Every sample stands below the type of its family.
        let mut types = std::collections::BTreeSet::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                assert!(types.insert(rest.split(' ').next().unwrap()), "{line} twice");
            } else if !line.starts_with('#') {
                assert!(types.contains(line.split('{').next().unwrap()), "{line}");
            }
        }
    }
}
