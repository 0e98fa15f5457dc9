//! Times as the services write them.

use jiff::Timestamp;

fn format(ms: u64, pattern: &str) -> String {
    let ms = i64::try_from(ms).unwrap_or(i64::MAX);
    let stamp = Timestamp::from_millisecond(ms).unwrap_or(Timestamp::MAX);
    stamp.strftime(pattern).to_string()
}

/// `2026-01-02T03:04:05Z`: compute, image and network.
pub(crate) fn seconds(ms: u64) -> String {
    format(ms, "%Y-%m-%dT%H:%M:%SZ")
}

/// `2026-01-02T03:04:05.678000Z`: identity.
pub(crate) fn micros(ms: u64) -> String {
    format(ms, "%Y-%m-%dT%H:%M:%S.%6fZ")
}

/// `2026-01-02T03:04:05.678000`: block storage, and compute's extension fields.
pub(crate) fn micros_naive(ms: u64) -> String {
    format(ms, "%Y-%m-%dT%H:%M:%S.%6f")
}

/// Reads a time as clients write it; with or without a zone (then UTC).
pub(crate) fn parse_ms(text: &str) -> Option<u64> {
    let text = text.trim();
    let stamp = text
        .parse::<Timestamp>()
        .or_else(|_| format!("{}Z", text.replacen(' ', "T", 1)).parse::<Timestamp>())
        .ok()?;
    u64::try_from(stamp.as_millisecond()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_the_forms_of_the_services_and_reads_them_back() {
        let ms = 1_767_323_045_678;
        assert_eq!(seconds(ms), "2026-01-02T03:04:05Z");
        assert_eq!(micros(ms), "2026-01-02T03:04:05.678000Z");
        assert_eq!(micros_naive(ms), "2026-01-02T03:04:05.678000");
        assert_eq!(parse_ms("2026-01-02T03:04:05.678000"), Some(ms));
        assert_eq!(parse_ms("2026-01-02 03:04:05"), Some(1_767_323_045_000));
        assert_eq!(parse_ms("2026-01-02T04:04:05+01:00"), Some(1_767_323_045_000));
        assert_eq!(parse_ms("yesterday"), None);
    }
}
