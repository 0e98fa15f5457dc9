//! A volume has one writer: writes land with generations that never go back, and none lands of a
//! server that the volume was taken from and given to another.

use std::collections::BTreeMap;

use controller::ids::{HostId, ServerId, VolumeId};
use controller::state::State;
use controller::state::volume::AttachmentState;

/// A write to a volume.
#[derive(Clone, Debug)]
pub(crate) struct Write {
    /// To which.
    pub(crate) volume: VolumeId,
    /// By which server.
    pub(crate) server: ServerId,
    /// Running where.
    pub(crate) host: HostId,
    /// Holding which generation of the attachment.
    pub(crate) generation: u64,
}

/// The newest generation that wrote to each volume, and who that was.
#[derive(Default)]
pub(crate) struct OneWriter {
    newest: BTreeMap<VolumeId, (u64, ServerId)>,
}

impl OneWriter {
    /// A write landed, while the newest state anywhere was `state`.
    pub(crate) fn wrote(&mut self, write: &Write, state: &State) -> Result<(), String> {
        let Write { volume, server, host, generation } = write;
        let this = (*generation, server.clone());
        let newest = self.newest.entry(volume.clone()).or_insert_with(|| this.clone());
        if *generation < newest.0 {
            return Err(format!(
                "volume {volume} was written with generation {generation} by {server} on host \
                 {host} after generation {}",
                newest.0
            ));
        }
        if *generation == newest.0 && *server != newest.1 {
            return Err(format!(
                "volume {volume} has two writers at generation {generation}: {server} and {}",
                newest.1
            ));
        }
        *newest = this;
        let known = state.volume.volumes.get(volume);
        let given = known.and_then(|volume| volume.attachments.first()).filter(|attachment| {
            attachment.state == AttachmentState::Attached && attachment.generation > *generation
        });
        match given {
            Some(given) => Err(format!(
                "volume {volume} is attached with generation {}, and was written with {generation}",
                given.generation
            )),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(server: &str, generation: u64) -> Write {
        Write { volume: "v".into(), server: server.into(), host: HostId(1), generation }
    }

    #[test]
    fn an_older_generation_and_a_second_writer_are_found() {
        let mut checker = OneWriter::default();
        let state = State::default();
        assert!(checker.wrote(&write("a", 1), &state).is_ok());
        assert!(checker.wrote(&write("b", 2), &state).is_ok());
        assert!(checker.wrote(&write("a", 1), &state).is_err());
        assert!(checker.wrote(&write("a", 2), &state).is_err());
    }
}
