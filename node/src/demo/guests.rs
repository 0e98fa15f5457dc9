//! What the demo's two guests are told to do, as their user_data.

/// What is written to the volume, and expected there by the other guest.
const PATTERN: &str = "trine-demo";
const PATTERN_BYTES: u32 = 1 << 20;
/// What the first guest serves.
pub(super) const GREETING: &str = "hello from a guest of trine";

/// How a guest names a volume: its serial number is the id's first 20 characters.
pub(super) fn serial(volume_id: &str) -> &str {
    &volume_id[..volume_id.len().min(20)]
}

/// Serves HTTP, then writes and verifies the pattern on the volume and sees it go.
pub(super) fn first(volume_id: &str, peer: &str) -> String {
    let serial = serial(volume_id);
    format!(
        "#trine-steps\n\
         http-serve 80 {GREETING}\n\
         ping {peer} count=3 timeout=60\n\
         disk-wait {serial} timeout=300\n\
         disk-write {serial} pattern={PATTERN} bytes={PATTERN_BYTES}\n\
         disk-gone {serial} timeout=300\n"
    )
}

/// Fetches from the first guest, then reads the pattern back from the same volume.
pub(super) fn second(volume_id: &str, peer: &str) -> String {
    let serial = serial(volume_id);
    format!(
        "#trine-steps\n\
         ping {peer} count=3 timeout=60\n\
         http-get http://{peer}/ expect=hello timeout=60\n\
         disk-wait {serial} timeout=300\n\
         disk-verify {serial} pattern={PATTERN} bytes={PATTERN_BYTES}\n"
    )
}
