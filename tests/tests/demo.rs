//! The README's first command, as a test.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::{kvm_opens, trine};

#[test]
fn the_demo_does_the_main_job() -> Result<()> {
    if !kvm_opens("the_demo_does_the_main_job") {
        return Ok(());
    }
    let output = Command::new(trine()).args(["demo", "--json", "--launches", "3"]).output()?;
    let printed = String::from_utf8_lossy(&output.stdout);
    println!("{printed}{}", String::from_utf8_lossy(&output.stderr));
    let last = printed.lines().last().context("it printed nothing")?;
    let summary: Value = serde_json::from_str(last)?;
    ensure!(output.status.success() && summary["ok"] == true, "the demo failed");
    for name in ["guest2 reads the same bytes", "guests keep running", "it finds its guests"] {
        let steps = summary["steps"].as_array().context("steps")?;
        let step = steps.iter().find(|step| step["name"] == name);
        ensure!(step.is_some_and(|step| step["ok"] == true), "no step {name:?} that is ok");
    }
    let series = summary["launch"]["series"].as_array().context("launch.series")?;
    for name in ["floor", "cold/no-devices", "cold/devices", "api/active", "api/first-line"] {
        ensure!(series.iter().any(|s| s["name"] == name && s["n"] == 3), "no series {name}");
    }
    Ok(())
}
