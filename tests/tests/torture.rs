//! A short torture run; `cargo xtask torture` makes long ones.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests::torture::{self, Options};
use tests::trine;

/// How long faults go on, seconds, where `TRINE_TORTURE_SECONDS` doesn't say.
const SECONDS: u64 = 60;

#[test]
fn every_promise_is_kept_under_faults() -> Result<()> {
    if let Some(lack) = torture::lacks() {
        eprintln!("SKIPPED every_promise_is_kept_under_faults: {lack}");
        return Ok(());
    }
    let seconds = std::env::var("TRINE_TORTURE_SECONDS").ok();
    let seconds = seconds.map_or(Ok(SECONDS), |text| text.parse())?;
    let options =
        Options { trine: trine(), duration: Duration::from_secs(seconds), seed: 1, keep: false };
    let report = torture::run(&options)?;
    println!("{:#}", report.figures);
    ensure!(
        report.figures["operations_checked"].as_u64() > Some(seconds),
        "hardly anything was done"
    );
    ensure!(
        report.findings.is_empty(),
        "{:#?}; see {}",
        report.findings,
        report.directory.display()
    );
    Ok(())
}
