//! What `vmm/README.md` says works as it is printed there: its first steps are run by a shell, its
//! configuration and requests are parsed, and nothing that can be configured or asked is missing.

use serde_json::Value;
use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use vmm::config::VmConfig;
use vmm::control::{Envelope, Metrics, RunState, Timings};

mod scripted;

const README: &str = include_str!("../README.md");

/// The part below a heading.
fn section(heading: &str) -> &'static str {
    let start = README.find(&format!("\n## {heading}\n")).expect("the heading is there") + 4;
    let rest = &README[start..];
    &rest[..rest.find("\n## ").unwrap_or(rest.len())]
}

/// Its indented lines.
fn commands(heading: &str) -> String {
    let lines = section(heading).lines().filter_map(|line| line.strip_prefix("    "));
    lines.fold(String::new(), |all, line| all + line + "\n")
}

/// Has a driver for its disk and lets go of every device it is asked for.
fn obliging_guest() -> Vec<u8> {
    let mut script = scripted::Script::default();
    script.start(1, 1);
    script.forever(scripted::Script::let_go);
    script.image(0)
}

/// Runs a script with `trine` as the built executable of this crate answers for it, in a directory
/// and a network of its own; returns what it printed.
fn run(script: &str) -> String {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("image"), obliging_guest()).unwrap();
    let prelude = format!(
        "set -e\nvmm={}\ntrine() {{\n  case \"$1 $2\" in\n    'image export') cp image \"$3\";;\n    \
         'vmm control') shift; \"$vmm\" \"$@\";;\n    *) shift; exec \"$vmm\" run \"$@\";;\n  esac\n}}\n",
        env!("CARGO_BIN_EXE_trine-vmm")
    );
    std::fs::write(directory.path().join("script"), prelude + script).unwrap();
    let output = Command::new("timeout")
        .args(["60", "unshare", "--net", "sh", "script"])
        .current_dir(directory.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let wrong = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{}\n{said}\n{wrong}", output.status);
    assert!(!directory.path().join("demo.sock").exists());
    said
}

#[test]
fn the_first_steps_and_a_program_that_asks_work_as_printed() {
    let opens = |path: &str| std::fs::OpenOptions::new().read(true).write(true).open(path).is_ok();
    if !(rustix::process::geteuid().is_root() && opens("/dev/kvm") && opens("/dev/net/tun")) {
        return eprintln!("SKIPPED: it needs root, /dev/kvm and /dev/net/tun");
    }
    let steps = commands("Try it");
    let asks = commands("Control requests");
    let program = asks.find("END\n{").map_or(asks.as_str(), |end| &asks[..end + 4]);
    let has_python = Command::new("python3").arg("--version").output().is_ok();
    let program = if has_python { program } else { "echo running\n" };
    // The program asks while the guest runs.
    const KILL: &str = "trine vmm control demo.sock kill";
    let said = run(&steps.replace(KILL, &format!("{program}{KILL}")));
    for expected in [
        "\"state\": \"running\"",
        "# TYPE trine_vmm_running gauge",
        "\"target_mib\": 16",
        "\nrunning\n",
        "\"reason\":\"killed\"",
    ] {
        assert!(said.contains(expected), "{expected} in {said}");
    }
}

/// Adds the keys of `value` and of all below it, as paths without positions. Limits are the same
/// wherever they stand.
fn keys(value: &Value, path: &str, into: &mut BTreeSet<String>) {
    match value {
        Value::Object(members) => members.iter().for_each(|(key, below)| {
            let is_limit = ["operations", "bytes"].contains(&key.as_str());
            let path = format!("{}.{key}", if is_limit { "limits" } else { path });
            keys(below, &path, into);
            into.insert(path);
        }),
        Value::Array(items) => items.iter().for_each(|item| keys(item, path, into)),
        _ => {}
    }
}

#[test]
fn the_configuration_is_one_and_has_every_key() {
    let text = section("Configuration");
    let start = text.find("```json\n").unwrap() + 8;
    let json = &text[start..start + text[start..].find("```").unwrap()];
    let config: VmConfig = serde_json::from_str(json).unwrap();
    assert_eq!(config.problems(), Vec::<String>::new());
    let (mut printed, mut known) = (BTreeSet::new(), BTreeSet::new());
    keys(&serde_json::from_str(json).unwrap(), "", &mut printed);
    keys(&serde_json::to_value(&config).unwrap(), "", &mut known);
    // What only a program that passes descriptors has.
    let only_inside = [".lease", ".vsock.connector"];
    let missing = known.difference(&printed).filter(|key| !only_inside.contains(&key.as_str()));
    let missing: Vec<_> = missing.collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn every_request_has_an_example_that_is_one() {
    let text = commands("Control requests");
    let examples: Vec<_> = text.lines().filter(|line| line.starts_with("{\"version\"")).collect();
    let mut shown = BTreeSet::new();
    for example in examples {
        let envelope: Envelope =
            serde_json::from_str(example).unwrap_or_else(|error| panic!("{example}: {error}"));
        match serde_json::to_value(&envelope.request).unwrap() {
            Value::String(name) => drop(shown.insert(name)),
            Value::Object(request) => shown.extend(request.into_iter().map(|(name, _)| name)),
            other => panic!("{other}"),
        }
    }
    // The parser says which requests there are.
    let unknown = serde_json::from_str::<Envelope>(r#"{"version": 1, "request": "?"}"#);
    let error = unknown.unwrap_err().to_string();
    let known = error.split("expected one of").nth(1).expect("the parser lists them");
    let known: BTreeSet<String> = known.split('`').skip(1).step_by(2).map(Into::into).collect();
    assert!(known.len() > 10, "{error}");
    assert_eq!(known.difference(&shown).collect::<Vec<_>>(), Vec::<&String>::new());
}

#[test]
fn every_command_is_described_and_every_metric_too() {
    for line in vmm::control::command::USAGE.lines() {
        let command = line.split_whitespace().nth(3).expect("a command");
        assert!(README.contains(&format!("`{command}")), "{command}");
    }
    let measured = Metrics {
        id: "demo".into(),
        state: RunState::Running,
        memory_mib: 16,
        vcpus: 1,
        cpu_ns: 0,
        timings: Timings::default(),
        devices: Vec::new(),
    };
    let text = measured.prometheus();
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let names: Vec<_> = types.filter_map(|line| line.split(' ').next()).collect();
    assert!(names.len() > 10, "{text}");
    for name in names {
        assert!(section("Metrics").contains(&format!("`{name}`")), "{name}");
    }
}
