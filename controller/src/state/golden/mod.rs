//! The bytes that logs and snapshots hold, one line for each kind of command and outcome.
//!
//! `formats_N.golden` holds what the program of feature level N wrote. The newest file is
//! compared byte for byte; every older one must decode for ever to the same values, with
//! defaults for what came later. A line that must change is a new file, never an edit.

mod samples;

use std::collections::BTreeSet;

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::cluster::ClusterCommand;
use super::compute::ComputeCommand;
use super::identity::IdentityCommand;
use super::image::ImageCommand;
use super::network::NetworkCommand;
use super::volume::VolumeCommand;
use super::{
    Command, DecodeError, Outcome, QuotaCommand, RejectionKind, State, decode_result, encode_result,
};
use crate::ids::HostId;

/// What programs of feature level 1 wrote.
const FORMATS_1: &str = include_str!("formats_1.golden");
/// What this program writes.
const FORMATS: &str = include_str!("formats_2.golden");
/// What older ones wrote.
const OLDER: [&str; 1] = [FORMATS_1];

/// Every variant of an enum, as serde lists them when it meets a stranger.
fn variants<T: DeserializeOwned>() -> BTreeSet<String> {
    let why = match serde_json::from_value::<T>(json!("no such variant")) {
        Ok(_) => panic!("a stranger was taken for a variant"),
        Err(why) => why.to_string(),
    };
    let names = why.split("expected").nth(1).expect("serde lists what it expects");
    names.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// `Cluster.Init`, `Ignored`: the names of an enum's variants, outermost first.
fn name_of(value: &Value, depth: usize) -> String {
    match value {
        Value::String(name) => name.clone(),
        Value::Object(fields) => {
            let (name, inner) = fields.iter().next().expect("an enum has one variant");
            match depth {
                0 => name.clone(),
                _ => format!("{name}.{}", name_of(inner, depth - 1)),
            }
        }
        other => panic!("{other} is no enum"),
    }
}

fn lines() -> Vec<(String, Vec<u8>)> {
    let value = |command: &Command| serde_json::to_value(command).expect("plain data");
    let commands = samples::commands()
        .into_iter()
        .map(|command| (format!("command.{}", name_of(&value(&command), 1)), command.encode()));
    let outcomes = samples::results().into_iter().map(|result| {
        let name = match &result {
            Ok(outcome) => name_of(&serde_json::to_value(outcome).expect("plain data"), 0),
            Err(why) => format!("{:?}", why.kind),
        };
        (format!("outcome.{name}"), encode_result(&result))
    });
    let snapshot = ("snapshot".to_owned(), samples::cloud().state.snapshot());
    commands.chain(outcomes).chain([snapshot]).collect()
}

fn parse(golden: &str) -> Vec<(String, Vec<u8>)> {
    golden
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, bytes)| (name.to_owned(), hex::decode(bytes).expect("the file holds hex")))
        .collect()
}

/// What is in `old` is in `new` with the same value; `new` may have more fields.
fn keeps(old: &Value, new: &Value) -> bool {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            old.iter().all(|(name, old)| new.get(name).is_some_and(|new| keeps(old, new)))
        }
        (Value::Array(old), Value::Array(new)) => {
            old.len() == new.len() && old.iter().zip(new).all(|(old, new)| keeps(old, new))
        }
        _ => old == new,
    }
}

fn fields(bytes: &[u8]) -> Value {
    rmp_serde::from_slice(bytes).expect("MessagePack")
}

#[test]
fn the_newest_formats_do_not_change() {
    let (golden, now) = (parse(FORMATS), lines());
    let text: String =
        now.iter().map(|(name, bytes)| format!("{name} {}\n", hex::encode(bytes))).collect();
    let changed = golden.iter().zip(&now).find(|(old, new)| old != new);
    let changed = changed.map(|(old, _)| &old.0);
    if changed.is_some() || golden.len() != now.len() {
        let path = std::env::temp_dir().join("formats.golden");
        std::fs::write(&path, text).expect("the temporary directory can be written");
        panic!(
            "{changed:?} has other bytes, or a line is new: what is right is in {}; formats that were released go into a new file",
            path.display()
        );
    }
}

#[test]
fn every_kind_of_command_and_outcome_has_a_line() {
    let names: BTreeSet<String> = lines().into_iter().map(|(name, _)| name).collect();
    let mut wanted: BTreeSet<String> = BTreeSet::new();
    for (service, variants) in [
        ("Cluster", variants::<ClusterCommand>()),
        ("Identity", variants::<IdentityCommand>()),
        ("Image", variants::<ImageCommand>()),
        ("Compute", variants::<ComputeCommand>()),
        ("Volume", variants::<VolumeCommand>()),
        ("Network", variants::<NetworkCommand>()),
        ("Quota", variants::<QuotaCommand>()),
    ] {
        wanted.extend(variants.into_iter().map(|variant| format!("command.{service}.{variant}")));
    }
    let outcomes = variants::<Outcome>().into_iter().chain(variants::<RejectionKind>());
    wanted.extend(outcomes.map(|variant| format!("outcome.{variant}")));
    wanted.insert("snapshot".into());
    assert_eq!(names, wanted);
    assert_eq!(variants::<Command>().len(), 7, "a service has commands and no line");
}

#[test]
fn what_older_programs_wrote_is_read_with_nothing_lost() {
    for (name, bytes) in OLDER.iter().flat_map(|golden| parse(golden)) {
        let again = match name.split_once('.') {
            Some(("command", _)) => Command::decode(&bytes).map(|command| command.encode()),
            Some(("outcome", _)) => decode_result(&bytes).map(|result| encode_result(&result)),
            _ => continue,
        };
        let again = again.unwrap_or_else(|why| panic!("{name}: {why}"));
        assert!(keeps(&fields(&bytes), &fields(&again)), "{name} lost something");
    }
}

#[test]
fn a_snapshot_of_level_1_is_read_and_goes_on_at_level_1() {
    let (_, bytes) = parse(FORMATS_1).pop().expect("the snapshot is the last line");
    let state = State::restore(&bytes).expect("it was written by an older program");
    state.check_invariants().expect("it holds together");
    assert_eq!(state.cluster.feature_level, 1);
    let host = &state.cluster.hosts[&HostId(2)];
    assert_eq!((host.fenced, host.fence_epoch, host.evacuate), (None, 0, false));
    assert_eq!(host.feature_level, 1);
    assert_eq!((state.compute.servers.len(), state.volume.volumes.len()), (1, 1));
    assert_eq!((state.outcomes.len(), state.applied_index), (23, 23));
    let again = State::restore(&state.snapshot()).expect("its own");
    assert!(again == state);
}

#[test]
fn a_later_version_of_the_encoding_is_refused_by_name() {
    let bytes = super::command::encode_as(super::ENCODING_VERSION + 1, &samples::commands()[0]);
    assert!(matches!(Command::decode(&bytes), Err(DecodeError::Version(2))));
}
