use std::future::Future;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};

use crate::bench::Figures;

/// What the demo prints: each step with its time, progress while it runs, and the end's summary.
pub(super) struct Report {
    start: Instant,
    json: bool,
    steps: Vec<Step>,
    launch: Option<Figures>,
    progress: Option<ProgressBar>,
}

#[derive(Serialize)]
struct Step {
    name: String,
    ok: bool,
    ms: f64,
    detail: String,
}

impl Report {
    pub(super) fn new(json: bool) -> Report {
        Report { start: Instant::now(), json, steps: Vec::new(), launch: None, progress: None }
    }

    /// Runs one step and prints how it ended. Its detail is what the step returns.
    pub(super) async fn step<T: Detail>(
        &mut self,
        name: &str,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let progress = spinner(name);
        self.progress = Some(progress.clone());
        let start = Instant::now();
        let result = work.await;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        progress.finish_and_clear();
        self.progress = None;
        let (ok, detail) = match &result {
            Ok(value) => (true, value.detail()),
            Err(error) => (false, format!("{error:#}")),
        };
        println!(
            "{:>8.2} s  {}  {name:<34} {:>9}  {detail}",
            self.start.elapsed().as_secs_f64(),
            if ok { "ok    " } else { "FAILED" },
            duration(ms),
        );
        self.steps.push(Step { name: name.to_string(), ok, ms, detail });
        result.with_context(|| format!("step {name:?} failed"))
    }

    /// Prints text between steps.
    pub(super) fn text(&self, text: &str) {
        println!("{text}");
    }

    pub(super) fn set_launch(&mut self, figures: Figures) {
        println!("\n{}\n", figures.table());
        self.launch = Some(figures);
    }

    /// The last lines.
    pub(super) fn finish(&self, error: Option<&anyhow::Error>) {
        let seconds = self.start.elapsed().as_secs_f64();
        match error {
            None => println!("done: {} steps in {seconds:.1} s", self.steps.len()),
            Some(error) => println!("failed after {seconds:.1} s: {error:#}"),
        }
        if self.json {
            println!("{}", self.summary(error));
        }
    }

    fn summary(&self, error: Option<&anyhow::Error>) -> Value {
        json!({"ok": error.is_none(), "steps": self.steps, "launch": self.launch})
    }
}

/// What a step's line says of its result.
pub(super) trait Detail {
    fn detail(&self) -> String;
}

impl Detail for String {
    fn detail(&self) -> String {
        self.clone()
    }
}

impl Detail for Figures {
    fn detail(&self) -> String {
        format!("{} series", self.series.len())
    }
}

fn spinner(name: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}");
    let progress = ProgressBar::new_spinner().with_message(name.to_string());
    if let Ok(style) = style {
        progress.set_style(style);
    }
    progress.enable_steady_tick(Duration::from_millis(100));
    progress
}

fn duration(ms: f64) -> String {
    if ms < 1000.0 { format!("{ms:.1} ms") } else { format!("{:.2} s", ms / 1e3) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failed_step_is_in_the_summary_with_its_reason() {
        let mut report = Report::new(true);
        report.step("first", async { Ok(String::from("fine")) }).await.unwrap();
        let error = report
            .step("second", async { Err::<String, _>(anyhow::anyhow!("no disk")) })
            .await
            .unwrap_err();
        let summary = report.summary(Some(&error));
        assert_eq!(summary["ok"], false);
        assert_eq!(summary["steps"][0]["detail"], "fine");
        assert_eq!(summary["steps"][1]["ok"], false);
        assert_eq!(summary["steps"][1]["detail"], "no disk");
        assert!(summary["launch"].is_null());
    }
}
