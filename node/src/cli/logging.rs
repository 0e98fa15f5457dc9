//! Log lines go to standard error; `TRINE_LOG` chooses what is logged.

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// The environment variable that holds the filter, as `info,raft=debug`.
const VARIABLE: &str = "TRINE_LOG";
/// Our own crates.
const OURS: [&str; 6] = ["node", "trine", "netstack", "storage", "controller", "raft"];

/// Starts logging for this process.
pub(crate) fn start() {
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    let result = tracing_subscriber::registry().with(filter()).with(lines).try_init();
    if let Err(error) = result {
        eprintln!("trine: cannot start logging: {error}");
    }
}

fn filter() -> Targets {
    let warnings = Targets::new().with_default(LevelFilter::WARN);
    let wanted = std::env::var(VARIABLE).unwrap_or_default();
    if wanted.is_empty() {
        return warnings.with_targets(OURS.map(|name| (name, LevelFilter::INFO)));
    }
    wanted.parse().unwrap_or_else(|error| {
        eprintln!("trine: {VARIABLE}={wanted:?} is no log filter ({error}); logging warnings");
        warnings
    })
}
