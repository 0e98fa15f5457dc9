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

/// What is in the directory of a test.
fn left(scratch: &Scratch) -> Vec<String> {
    let entries = std::fs::read_dir(&scratch.0).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn every_bad_configuration_is_one_clear_line_and_leaves_nothing() {
    let scratch = Scratch::new("bad");
    let path = |name: &str| scratch.0.join(name);
    std::fs::write(path("taken"), b"").unwrap();
    std::fs::write(path("disk"), vec![0; 4096]).unwrap();
    let nothing = path("nothing");
    let raw =
        |name: &str| serde_json::json!([{"id": "d", "source": {"raw": {"path": path(name)}}}]);
    // All of them also name a console, a record and a socket, which must not be there afterwards.
    let cases = [
        (serde_json::json!({"vpcus": 2}), "unknown field `vpcus`"),
        (serde_json::json!({"boot": {"kernel": {"path": nothing}}}), "boot.kernel: "),
        (serde_json::json!({"boot": {}}), "missing field `kernel`"),
        (serde_json::json!({"vcpus": 0}), "vcpus: 0; a guest needs at least 1"),
        (serde_json::json!({"vcpus": 300}), "300"),
        (serde_json::json!({"memory_mib": 16 << 20}), "more than this host has"),
        (serde_json::json!({"memory_mib": 15}), "memory_mib: 15; from 16"),
        (serde_json::json!({"disks": raw("nothing")}), "disks[0].source.raw: "),
        (serde_json::json!({"disks": raw("")}), "Is a directory"),
        (serde_json::json!({"disks": raw("taken")}), "at least one sector"),
        (serde_json::json!({"control": {"path": path("taken")}}), "taken exists"),
        (serde_json::json!({"control": {"path": path("none/socket")}}), "control: "),
        (serde_json::json!({"control": {"descriptor": 3}}), "control: only paths"),
        (serde_json::json!({"version": 2}), "version: 2 is not known"),
        (
            serde_json::json!({"nets": [{"id": "n", "mac": "fa:16:3e:00:00:01",
            "backend": {"tap": {"path": "no-such-interface-name"}}}]}),
            "net \"n\": TAP interface",
        ),
        (
            serde_json::json!({"nets": [{"id": "n", "mac": "x",
            "backend": {"tap": {"path": "t"}}}]}),
            "net \"n\": mac \"x\"",
        ),
    ];
    for (change, expected) in cases {
        let mut extra = serde_json::json!({
            "console": {"file": {"path": path("console")}},
            "control": {"path": path("socket")},
        });
        extra.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let output = scratch.run(&probe::image(false, 0), extra);
        let lines = stderr(&output);
        if !kvm() && lines.contains("/dev/kvm") {
            continue;
        }
        assert_eq!(output.status.code(), Some(2), "{change}: {lines}");
        assert_eq!((lines.lines().count(), output.stdout.len()), (1, 0), "{change}: {lines}");
        assert!(lines.contains(expected), "{change}: {lines}");
        assert_eq!(left(&scratch), ["config", "disk", "kernel", "taken"], "{change}");
    }
}

#[test]
fn a_file_that_was_there_before_a_refused_start_stays() {
    let scratch = Scratch::new("stays");
    std::fs::write(scratch.0.join("exit"), b"").unwrap();
    let output = scratch.run(b"no kernel", serde_json::json!({}));
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert_eq!(left(&scratch), ["config", "exit", "kernel"]);
}

#[test]
fn a_guest_may_end_with_the_code_of_a_refusal() {
    if !kvm() {
        return;
    }
    let scratch = Scratch::new("code2");
    let output = scratch.run(
        &probe::image(true, 2),
        serde_json::json!({"console": {"file": {"path": scratch.0.join("console")}}}),
    );
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(2), ""));
    assert_eq!(left(&scratch), ["config", "console", "exit", "kernel"]);
    assert_eq!(scratch.record().code, Some(2));
}

#[test]
fn unknown_arguments_and_a_missing_configuration_are_one_line() {
    let run = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_trine-vmm")).args(arguments).output().unwrap()
    };
    for (arguments, expected) in [
        (&["run"][..], "see trine-vmm --help"),
        (&["run", "--config", "/nonexistent"], "/nonexistent: No such file"),
        (&["run", "--config", "/tmp"], "/tmp: "),
        (&["control"], "see trine-vmm --help"),
        (&["control", "/nonexistent", "status"], "/nonexistent: control socket: No such file"),
    ] {
        let output = run(arguments);
        let lines = stderr(&output);
        assert_eq!((output.status.code(), lines.lines().count()), (Some(2), 1), "{lines}");
        assert!(lines.contains(expected), "{arguments:?}: {lines}");
    }
    let help = run(&["--help"]);
    let text = String::from_utf8_lossy(&help.stdout).into_owned();
    assert!(help.status.success());
    for what in ["--config FILE", "--boot-timer", "add-disk JSON", "metrics", "\"version\": 1"] {
        assert!(text.contains(what), "{what} in {text}");
    }
}
