//! `trine status`: how this host's node is.

use crate::daemon::local::{self, LocalRequest};
use anyhow::Result;
use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use serde_json::Value;
use std::path::PathBuf;

/// What `trine status` takes.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  trine status --data-dir /var/lib/trine\n  trine status --data-dir /var/lib/trine --json | jq .leader"
)]
pub(crate) struct Args {
    /// The node's data directory.
    #[arg(long)]
    data_dir: PathBuf,
    /// Prints everything as one JSON object.
    #[arg(long)]
    json: bool,
}

/// Asks the running node and prints its answer.
pub(crate) fn run(args: Args) -> Result<()> {
    let status = local::ask(&args.data_dir, &LocalRequest::Status)?;
    if args.json {
        println!("{status}");
        return Ok(());
    }
    let leader = status["leader"].as_u64().map_or("none".into(), |id| id.to_string());
    println!("node {}   leader {leader}   applied {}", status["node_id"], status["applied"]);
    print_table("Hosts", &status["hosts"], &["id", "name", "address", "up", "voter"]);
    print_table("Processes", &status["processes"], &["name", "pid", "state"]);
    print_table("Guests on this host", &status["guests"], &["id", "pid", "state", "generation"]);
    Ok(())
}

/// Prints rows of JSON objects as a table.
pub(super) fn print_table(title: &str, rows: &Value, columns: &[&str]) {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_header(columns);
    for row in rows.as_array().into_iter().flatten() {
        table.add_row(columns.iter().map(|column| match &row[*column] {
            Value::String(text) => text.clone(),
            Value::Null => String::new(),
            other => other.to_string(),
        }));
    }
    println!("{title}\n{table}");
}
