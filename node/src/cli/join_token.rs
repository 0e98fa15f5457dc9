//! `trine join-token`: asks the running node for a one-time token.

use crate::daemon::local::{self, LocalRequest};
use anyhow::{Context, Result, bail};
use std::path::PathBuf;

/// Longest life of a token.
const TTL_SECONDS_MAX: u64 = 7 * 24 * 3600;

/// What `trine join-token` takes.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  trine join-token --data-dir /var/lib/trine\n  trine join-token --data-dir /var/lib/trine --ttl 10m --json"
)]
pub(crate) struct Args {
    /// The node's data directory.
    #[arg(long)]
    data_dir: PathBuf,
    /// How long the token may be used: a number and s, m, h or d.
    #[arg(long, default_value = "1h", value_parser = parse_ttl)]
    ttl: u64,
    /// Prints `{"token": …, "expires_ms": …}`.
    #[arg(long)]
    json: bool,
}

/// Prints a token.
pub(crate) fn run(args: Args) -> Result<()> {
    let request = LocalRequest::JoinToken { ttl_seconds: args.ttl };
    let answer = local::ask(&args.data_dir, &request)?;
    if args.json {
        println!("{answer}");
    } else {
        println!("{}", answer["token"].as_str().context("the node answered without a token")?);
    }
    Ok(())
}

pub(super) fn parse_ttl(text: &str) -> Result<u64> {
    let unit = match text.chars().last() {
        Some('s') => 1,
        Some('m') => 60,
        Some('h') => 3600,
        Some('d') => 24 * 3600,
        _ => bail!("{text:?} does not end in s, m, h or d"),
    };
    let number: u64 = text[..text.len() - 1].parse().context("a number comes before the unit")?;
    match number.checked_mul(unit) {
        Some(seconds @ 1..=TTL_SECONDS_MAX) => Ok(seconds),
        _ => bail!("{text:?} is not between 1s and 7d"),
    }
}

#[cfg(test)]
mod tests {
    use super::parse_ttl;

    #[test]
    fn a_ttl_has_a_number_a_unit_and_bounds() {
        assert_eq!(parse_ttl("90s").unwrap(), 90);
        assert_eq!(parse_ttl("10m").unwrap(), 600);
        assert_eq!(parse_ttl("1h").unwrap(), 3600);
        for wrong in ["", "h", "10", "-1h", "0s", "8d", "1y", "99999999999999999999d", "1ä"] {
            assert!(parse_ttl(wrong).is_err(), "{wrong}");
        }
    }
}
