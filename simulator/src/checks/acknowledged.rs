//! What a client was told is done stays done: the command is in the log where the answer said,
//! and what it made is there until somebody asks for its removal.

use std::collections::{BTreeMap, BTreeSet};

use controller::ids::{ServerId, VolumeId};
use controller::state::State;

use super::Agreement;

/// What clients were told.
#[derive(Default)]
pub(crate) struct Acknowledged {
    commands: BTreeMap<u64, [u8; 16]>,
    servers_made: BTreeSet<ServerId>,
    servers_deleted: BTreeSet<ServerId>,
    server_deletions_asked: BTreeSet<ServerId>,
    volumes_made: BTreeSet<VolumeId>,
    volume_deletions_asked: BTreeSet<VolumeId>,
    /// Commands that two answers placed differently.
    contradictions: Vec<String>,
}

impl Acknowledged {
    /// A client was told that its command is at `index`.
    pub(crate) fn command(&mut self, index: u64, command_id: [u8; 16]) {
        if *self.commands.entry(index).or_insert(command_id) != command_id {
            self.contradictions.push(format!("two commands were acknowledged at {index}"));
        }
    }

    /// A server was made.
    pub(crate) fn server_made(&mut self, id: &ServerId) {
        self.servers_made.insert(id.clone());
    }

    /// Somebody asks for a server's removal, whatever comes of it.
    pub(crate) fn server_deletion_asked(&mut self, id: &ServerId) {
        self.server_deletions_asked.insert(id.clone());
    }

    /// A server's removal was acknowledged.
    pub(crate) fn server_deleted(&mut self, id: &ServerId) {
        self.servers_deleted.insert(id.clone());
    }

    /// A volume was made.
    pub(crate) fn volume_made(&mut self, id: &VolumeId) {
        self.volumes_made.insert(id.clone());
    }

    /// Somebody asks for a volume's removal.
    pub(crate) fn volume_deletion_asked(&mut self, id: &VolumeId) {
        self.volume_deletions_asked.insert(id.clone());
    }

    /// How many commands were acknowledged.
    pub(crate) fn len(&self) -> usize {
        self.commands.len()
    }

    /// Judges at the end, when everything has settled.
    pub(crate) fn kept(&self, log: &Agreement, state: &State) -> Result<(), String> {
        if let Some(contradiction) = self.contradictions.first() {
            return Err(contradiction.clone());
        }
        for (index, command_id) in &self.commands {
            if log.command_at(*index) != Some(*command_id) {
                return Err(format!("an acknowledged command is no longer at {index}"));
            }
        }
        let servers = &state.compute.servers;
        let wanted = self.servers_made.difference(&self.server_deletions_asked);
        if let Some(lost) = wanted.into_iter().find(|id| !servers.contains_key(*id)) {
            return Err(format!("server {lost} was made, nobody deleted it, and it is gone"));
        }
        if let Some(back) = self.servers_deleted.iter().find(|id| servers.contains_key(*id)) {
            return Err(format!("server {back} was deleted and is still there"));
        }
        let volumes = &state.volume.volumes;
        let wanted = self.volumes_made.difference(&self.volume_deletions_asked);
        match wanted.into_iter().find(|id| !volumes.contains_key(*id)) {
            Some(lost) => Err(format!("volume {lost} was made, nobody deleted it, and it is gone")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_command_and_a_lost_server_are_found() {
        let mut log = Agreement::default();
        let state = State::default();
        log.applied(1, 1, [1; 16], b"", &state).expect("the first");
        let mut told = Acknowledged::default();
        told.command(1, [1; 16]);
        assert!(told.kept(&log, &state).is_ok());
        told.server_made(&"s".into());
        assert!(told.kept(&log, &state).is_err());
        told.server_deletion_asked(&"s".into());
        assert!(told.kept(&log, &state).is_ok());
        told.command(2, [2; 16]);
        assert!(told.kept(&log, &state).is_err());
    }
}
