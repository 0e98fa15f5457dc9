//! `trine-vmm run` on the real `/dev/kvm`: what a guest does reaches its console, its exit code and
//! its exit record; what is wrong is said in one line.

use std::path::PathBuf;
use std::process::{Command, Output};
use vmm::control::ExitRecord;
use vmm::probe;

fn kvm() -> bool {
    let opens = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !opens {
        eprintln!("SKIPPED: no /dev/kvm");
    }
    opens
}

/// A directory of its own for one test, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("trine-vmm-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    fn run(&self, image: &[u8], extra: serde_json::Value) -> Output {
        std::fs::write(self.0.join("kernel"), image).unwrap();
        let mut config = serde_json::json!({
            "version": 1, "id": "test", "memory_mib": 64, "nonce": "n1",
            "boot": {"kernel": {"path": self.0.join("kernel")}},
            "exit_record": {"path": self.0.join("exit")},
        });
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        std::fs::write(self.0.join("config"), config.to_string()).unwrap();
        Command::new(env!("CARGO_BIN_EXE_trine-vmm"))
            .args(["run", "--config"])
            .arg(self.0.join("config"))
            .output()
            .unwrap()
    }

    fn record(&self) -> ExitRecord {
        serde_json::from_slice(&std::fs::read(self.0.join("exit")).unwrap()).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_socket_in_use_is_not_taken_over() {
    let scratch = Scratch::new("inuse");
    let socket = scratch.0.join("control");
    std::fs::write(&socket, b"").unwrap();
    let output =
        scratch.run(&probe::image(false, 0), serde_json::json!({"control": {"path": socket}}));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("exists"), "{}", stderr(&output));
    assert!(socket.exists());
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_guests_line_and_exit_code_come_out() {
    if !kvm() {
        return;
    }
    let scratch = Scratch::new("line");
    let output = scratch.run(&probe::image(true, 7), serde_json::json!({}));
    assert_eq!(String::from_utf8_lossy(&output.stdout), probe::LINE, "{}", stderr(&output));
    assert_eq!(output.status.code(), Some(7));
    let record = scratch.record();
    assert_eq!(
        (record.reason.as_str(), record.code, record.nonce.as_str()),
        ("power_off", Some(7), "n1")
    );
    let times = record.timings;
    assert!(
        times.run_ns > 0 && times.main_ns >= times.run_ns && times.console_ns >= times.main_ns,
        "{times:?}"
    );
}

#[test]
fn a_triple_fault_is_a_crash_that_says_where() {
    if !kvm() {
        return;
    }
    let scratch = Scratch::new("crash");
    let output = scratch.run(&probe::crashing_image(), serde_json::json!({}));
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("rip 0x100078"), "{}", stderr(&output));
    assert_eq!(scratch.record().reason, "crash");
}

#[test]
fn what_is_wrong_is_said_and_nothing_is_left() {
    let scratch = Scratch::new("wrong");
    let output =
        scratch.run(&probe::image(false, 0), serde_json::json!({"memory_mib": 1, "vcpus": 0}));
    assert_eq!(output.status.code(), Some(2));
    let lines = stderr(&output);
    assert_eq!(lines.lines().count(), 2, "{lines}");
    assert!(lines.contains("memory_mib: 1") && lines.contains("vcpus: 0"), "{lines}");
    assert!(!scratch.0.join("exit").exists());
}

#[test]
fn a_file_that_is_no_kernel_is_refused() {
    if !kvm() {
        return;
    }
    let scratch = Scratch::new("nokernel");
    let socket = scratch.0.join("control");
    let output = scratch.run(b"#!/bin/sh\n", serde_json::json!({"control": {"path": socket}}));
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("kernel image"), "{}", stderr(&output));
    assert!(!socket.exists() && !scratch.0.join("exit").exists());
}

#[test]
fn what_a_unikernel_does_not_take_is_refused() {
    if !kvm() {
        return;
    }
    let scratch = Scratch::new("unikernel");
    let (kernel, initrd) = (scratch.0.join("kernel"), scratch.0.join("initrd"));
    std::fs::write(&initrd, b"x").unwrap();
    let boot = |initrd: &PathBuf| serde_json::json!({"kernel": {"path": kernel}, "initrd": {"path": initrd}});
    for (extra, expected) in [
        (serde_json::json!({"boot": boot(&initrd)}), "initrd: a unikernel takes none"),
        (serde_json::json!({"boot": boot(&scratch.0.join("none"))}), "boot.initrd: "),
        (serde_json::json!({"vcpus": 2}), "vcpus: 2; a unikernel has 1"),
    ] {
        let output = scratch.run(&probe::image(false, 0), extra);
        let lines = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{lines}");
        assert!(lines.lines().count() == 1 && lines.contains(expected), "{lines}");
        assert!(!scratch.0.join("exit").exists());
    }
}
