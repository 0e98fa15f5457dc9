//! Log lines go to standard error; `TRINE_LOG` chooses what is logged.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// The environment variable that holds the filter, as `info,raft=debug`.
const VARIABLE: &str = "TRINE_LOG";

/// Starts logging for this process.
pub(crate) fn start() {
    let wanted = std::env::var(VARIABLE).unwrap_or_default();
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::WARN.into())
        .parse(&wanted)
        .unwrap_or_else(|error| {
            eprintln!("trine: {VARIABLE}={wanted:?} is no log filter ({error}); logging warnings");
            EnvFilter::default().add_directive(LevelFilter::WARN.into())
        });
    let filter = if wanted.is_empty() {
        ["node=info", "trine=info", "netstack=info", "storage=info", "controller=info", "raft=info"]
            .into_iter()
            .filter_map(|directive| directive.parse().ok())
            .fold(filter, EnvFilter::add_directive)
    } else {
        filter
    };
    let result = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .try_init();
    if let Err(error) = result {
        eprintln!("trine: cannot start logging: {error}");
    }
}
