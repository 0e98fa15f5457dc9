//! What is left to do after a rotation of keys, for the leader; and the keys that tokens are made
//! with, for every node.

use crate::seal::{Sealed, Sealer};
use crate::state::cluster::{ClusterCommand, TokenKeyRing};
use crate::state::compute::ComputeCommand;
use crate::state::{Command, State};

/// Commands that seal with the current key what older ones seal, `max` of them at most; then
/// those that retire a key which seals nothing any more. The sealer must hold the keys: what it
/// can't open is left as it is, and its key is not retired. Needs a random IV, so it is for the
/// leader and not for `apply`.
pub fn reseal(state: &State, sealer: &Sealer, max: usize) -> Vec<Command> {
    let keys = &state.cluster.keys;
    let Some(current) = keys.current.as_deref().filter(|_| !keys.retiring.is_empty()) else {
        return Vec::new();
    };
    // Until this node has the new key it would only seal with the old one again.
    if sealer.key_ids().first().map(String::as_str) != Some(current) {
        return Vec::new();
    }
    let old = |sealed: &Sealed| keys.retiring.iter().any(|id| id == sealed.key_id());
    let servers = state.compute.servers.values().filter_map(|server| {
        let sealed = server.user_data.as_ref().filter(|sealed| old(sealed))?;
        Some(Command::Compute(ComputeCommand::ResealServer {
            id: server.id.clone(),
            from: sealed.key_id().to_owned(),
            user_data: anew(sealer, sealed)?,
        }))
    });
    let commands: Vec<Command> =
        token_key_command(state, sealer, &old).into_iter().chain(servers).take(max).collect();
    if !commands.is_empty() {
        return commands;
    }
    let unused = keys.retiring.iter().filter(|id| !state.sealed().any(|s| s.key_id() == *id));
    unused.map(|id| Command::Cluster(ClusterCommand::RetireKey { id: id.clone() })).collect()
}

fn anew(sealer: &Sealer, sealed: &Sealed) -> Option<Sealed> {
    sealer.open(sealed).ok().map(|secret| sealer.seal(&secret))
}

fn token_key_command(
    state: &State,
    sealer: &Sealer,
    old: &dyn Fn(&Sealed) -> bool,
) -> Option<Command> {
    let ring = &state.cluster.token_keys;
    if !ring.all().any(old) {
        return None;
    }
    let keys: Option<Vec<Sealed>> = ring.all().map(|sealed| anew(sealer, sealed)).collect();
    let rotations = ring.rotations;
    Some(Command::Cluster(ClusterCommand::ResealTokenKeys { rotations, keys: keys? }))
}

/// Which of the keys in a node's key file it can forget, by their ids: those that are retired.
pub fn keys_to_forget(state: &State, held: &[String]) -> Vec<String> {
    let keys = &state.cluster.keys;
    let used = |id: &&String| keys.current.as_ref() == Some(*id) || keys.retiring.contains(*id);
    held.iter().filter(|id| !used(id) && keys.retired.contains(*id)).cloned().collect()
}

/// The command that rotates the keys of tokens. The first rotation stages the key that was derived
/// from the cluster's and has made tokens so far, so that they stay valid when that one goes.
pub fn rotate_token_keys(
    ring: &TokenKeyRing,
    sealer: &Sealer,
    derived: [u8; 32],
    fresh: [u8; 32],
) -> ClusterCommand {
    let rotations = ring.rotations;
    let staged = if rotations == 0 { derived } else { fresh };
    ClusterCommand::RotateTokenKeys { rotations, staged: sealer.seal(&staged) }
}

/// How long the keys of tokens stay in use. A token is verified for some rotations more, which is
/// far longer than it is valid.
pub const TOKEN_KEYS_ROTATE_MS: u64 = 12 * 60 * 60 * 1000;

/// Whether the leader is to rotate the keys of tokens, at `now_ms` by its clock. The first two
/// rotations are due at once: before them there are not yet a staged and a primary key.
pub fn token_rotation_is_due(state: &State, now_ms: u64) -> bool {
    let ring = &state.cluster.token_keys;
    let age = now_ms.max(state.time_ms).saturating_sub(ring.rotated_ms);
    state.cluster.has(2) && (ring.primary.is_none() || age >= TOKEN_KEYS_ROTATE_MS)
}

/// The keys that tokens are made with, the first, and verified with, all of them. `derived` is
/// the key that follows from the cluster's: the one before the second rotation. There is none that
/// makes tokens where the primary key can't be opened.
pub fn token_keys(ring: &TokenKeyRing, sealer: &Sealer, derived: [u8; 32]) -> Vec<[u8; 32]> {
    let open = |sealed: &Sealed| <[u8; 32]>::try_from(sealer.open(sealed).ok()?).ok();
    let primary = match &ring.primary {
        Some(sealed) => open(sealed),
        None => Some(derived),
    };
    let others = || ring.staged.iter().chain(&ring.secondary).filter_map(open);
    primary.map(|primary| std::iter::once(primary).chain(others()).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::key_id;
    use crate::state::RejectionKind;
    use crate::state::fixture::{Sample, new_server, without_ports};

    const OLD: [u8; 32] = [1; 32];
    const NEW: [u8; 32] = [2; 32];

    fn rotate(from: [u8; 32], to: [u8; 32]) -> Command {
        let (from, to) = (key_id(&from), key_id(&to));
        Command::Cluster(ClusterCommand::RotateKey { from, to })
    }

    fn with_secrets(sealer: &Sealer) -> Sample {
        let mut sample = Sample::new();
        for n in 0..3 {
            let mut new = without_ports(new_server(&format!("s{n}"), None));
            new.user_data = Some(sealer.seal(b"#cloud-config"));
            sample.compute(ComputeCommand::CreateServer(Box::new(new)));
        }
        let staged = sealer.seal(&[7; 32]);
        sample.must(Command::Cluster(ClusterCommand::RotateTokenKeys { rotations: 0, staged }));
        sample
    }

    #[test]
    fn after_a_rotation_everything_is_sealed_anew_in_batches_and_the_old_key_is_retired() {
        let sealer = Sealer::new(OLD);
        let mut sample = with_secrets(&sealer);
        assert_eq!(reseal(&sample.state, &sealer, 2), []);
        sample.must(rotate(OLD, NEW));
        assert_eq!(reseal(&sample.state, &sealer, 2), [], "this node hasn't the key yet");
        sealer.set_keys(&[OLD, NEW], sample.state.cluster.keys.current.as_deref());
        let mut batches = Vec::new();
        loop {
            let commands = reseal(&sample.state, &sealer, 2);
            if commands.is_empty() {
                break;
            }
            batches.push(commands.len());
            commands.into_iter().for_each(|command| drop(sample.must(command)));
        }
        assert_eq!(batches, [2, 2, 1]);
        let keys = &sample.state.cluster.keys;
        assert_eq!((keys.retiring.len(), &keys.retired), (0, &vec![key_id(&OLD)]));
        assert!(sample.state.sealed().all(|sealed| sealed.key_id() == key_id(&NEW)));
        let user_data = sample.server("s1").user_data.clone().expect("it has some");
        let alone = Sealer::new(NEW);
        assert_eq!(alone.open(&user_data).as_deref(), Ok(b"#cloud-config".as_slice()));
        let held = [key_id(&OLD), key_id(&NEW), "unknown".to_owned()];
        assert_eq!(keys_to_forget(&sample.state, &held), [key_id(&OLD)]);
    }

    #[test]
    fn a_key_is_not_retired_while_it_seals_something_and_not_used_once_it_is() {
        let sealer = Sealer::new(OLD);
        let mut sample = with_secrets(&sealer);
        sample.must(rotate(OLD, NEW));
        let retire = Command::Cluster(ClusterCommand::RetireKey { id: key_id(&OLD) });
        sample.refused_as(retire, RejectionKind::InUse);
        let late = sealer.seal(b"late");
        sealer.set_keys(&[OLD, NEW], sample.state.cluster.keys.current.as_deref());
        while let [first, ..] = reseal(&sample.state, &sealer, 1).as_slice() {
            sample.must(first.clone());
        }
        let mut new = without_ports(new_server("late", None));
        new.user_data = Some(late);
        let create = Command::Compute(ComputeCommand::CreateServer(Box::new(new)));
        sample.refused_as(create, RejectionKind::Conflict);
        sample.refused_as(rotate(NEW, OLD), RejectionKind::Invalid);
        sample.refused_as(rotate(OLD, [3; 32]), RejectionKind::Conflict);
    }

    #[test]
    fn token_keys_are_rotated_by_stamped_time_and_the_key_of_before_verifies_still() {
        let sealer = Sealer::new(OLD);
        let mut sample = Sample::new();
        let derived = [9; 32];
        let rotate = |sample: &mut Sample, n: u8| {
            let ring = &sample.state.cluster.token_keys;
            let command = rotate_token_keys(ring, &sealer, derived, [n; 32]);
            sample.must(Command::Cluster(command));
        };
        for n in 0..2 {
            assert!(token_rotation_is_due(&sample.state, sample.state.time_ms), "rotation {n}");
            rotate(&mut sample, n);
        }
        let rotated_ms = sample.state.cluster.token_keys.rotated_ms;
        assert_eq!(rotated_ms, sample.state.time_ms);
        let made_with = token_keys(&sample.state.cluster.token_keys, &sealer, derived)[0];
        assert!(!token_rotation_is_due(&sample.state, rotated_ms + TOKEN_KEYS_ROTATE_MS - 1));
        assert!(!token_rotation_is_due(&sample.state, 0), "a clock behind the stamped time");
        assert!(token_rotation_is_due(&sample.state, rotated_ms + TOKEN_KEYS_ROTATE_MS));
        rotate(&mut sample, 2);
        let keys = token_keys(&sample.state.cluster.token_keys, &sealer, derived);
        assert_eq!(keys.len(), 3);
        assert!(keys[0] != made_with && keys[1..].contains(&made_with));
        assert!(!token_rotation_is_due(&sample.state, sample.state.time_ms));
    }

    #[test]
    fn token_keys_go_from_staged_to_primary_to_secondary() {
        let sealer = Sealer::new(OLD);
        let mut sample = Sample::new();
        let derived = [9; 32];
        let mut seen = vec![token_keys(&sample.state.cluster.token_keys, &sealer, derived)];
        for n in 0..5 {
            let ring = &sample.state.cluster.token_keys;
            let rotate = rotate_token_keys(ring, &sealer, derived, [n; 32]);
            sample.must(Command::Cluster(rotate));
            seen.push(token_keys(&sample.state.cluster.token_keys, &sealer, derived));
        }
        let first_bytes: Vec<Vec<u8>> =
            seen.iter().map(|keys| keys.iter().map(|key| key[0]).collect()).collect();
        let expected: [&[u8]; 6] =
            [&[9], &[9, 9], &[9, 1], &[1, 2, 9], &[2, 3, 1, 9], &[3, 4, 2, 1, 9]];
        assert_eq!(first_bytes, expected);
        let stranger = Sealer::new(NEW);
        assert_eq!(token_keys(&sample.state.cluster.token_keys, &stranger, derived), [[0; 32]; 0]);
        let stale = ClusterCommand::RotateTokenKeys { rotations: 4, staged: sealer.seal(&[8; 32]) };
        sample.refused_as(Command::Cluster(stale), RejectionKind::Conflict);
    }
}
