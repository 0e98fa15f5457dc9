//! Requests: any bytes on a socket, and any JSON in a frame.

use fuzz::{Source, Target, check};
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use vmm::config::VmConfig;
use vmm::control::Envelope;

#[test]
fn control_frames() {
    let frame = |message: &[u8]| [&(message.len() as u32).to_le_bytes(), message].concat();
    let samples = vec![frame(b""), frame(b"{}"), [frame(b"a"), frame(b"bc")].concat()];
    let run = &mut |source: &mut Source<'_>| {
        let (mut peer, ours) = UnixStream::pair().unwrap();
        let bytes = source.rest();
        peer.write_all(bytes).unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        let mut taken = 0;
        while let Ok(Some((message, descriptors))) = abi::control::receive(&ours) {
            assert!(descriptors.is_empty());
            assert_eq!(message, &bytes[taken + 4..taken + 4 + message.len()]);
            taken += 4 + message.len();
        }
    };
    check(Target { name: "control_frames", inputs: 4_000, samples, run });
}

#[test]
fn control_requests() {
    let requests = [
        r#""status""#,
        r#"{"add_disk": {"id": "a", "serial": "s", "source": {"raw": {"descriptor": 0}}}}"#,
        r#"{"add_disk": {"id": "a", "source": {"nbd": {"socket": {"descriptor": 0}, "size_bytes": 512}}}}"#,
        r#"{"remove_disk": {"id": "a"}}"#,
        r#"{"add_net": {"id": "n", "mac": "fa:16:3e:00:00:01", "mtu": 68, "backend": {"ring": [0, 1, 2]}}}"#,
        r#""pause""#,
        r#""kill""#,
    ];
    let samples = requests.map(|it| format!(r#"{{"version": 1, "request": {it}}}"#).into_bytes());
    for sample in &samples {
        serde_json::from_slice::<Envelope>(sample).unwrap();
    }
    let run = &mut |source: &mut Source<'_>| {
        // What is understood is said again in the same words.
        if let Ok(envelope) = serde_json::from_slice::<Envelope>(source.rest()) {
            let said = serde_json::to_vec(&envelope).unwrap();
            let again: Envelope = serde_json::from_slice(&said).unwrap();
            assert_eq!(serde_json::to_vec(&again).unwrap(), said);
        }
    };
    check(Target { name: "control_requests", inputs: 10_000, samples: samples.into(), run });
}

#[test]
fn configurations() {
    let whole = r#"{"version": 1, "id": "a", "memory_mib": 32, "vcpus": 1,
        "boot": {"kernel": {"path": "k"}, "initrd": {"descriptor": 1}, "cmdline": "a b"},
        "disks": [{"id": "d", "serial": "s", "read_only": true, "source": {"raw": {"path": "d"}}}],
        "nets": [{"id": "n", "mac": "fa:16:3e:00:00:01", "backend": {"tap": {"path": "t"}}}],
        "control": {"path": "c"}, "sandbox": {"uid": 5, "cgroups": []}}"#;
    serde_json::from_str::<VmConfig>(whole).unwrap();
    let run = &mut |source: &mut Source<'_>| {
        if let Ok(config) = serde_json::from_slice::<VmConfig>(source.rest()) {
            for problem in config.problems() {
                assert!(!problem.is_empty() && !problem.contains('\n'), "{problem:?}");
            }
        }
    };
    let samples = vec![whole.as_bytes().to_vec()];
    check(Target { name: "configurations", inputs: 10_000, samples, run });
}
