//! No server writes from two places: once an incarnation of it has started, no write of an earlier
//! one lands.

use std::collections::BTreeMap;

use controller::ids::{HostId, ServerId};

/// One start of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Incarnation {
    nonce: u64,
    host: HostId,
    generation: u64,
}

/// The latest start of each server.
#[derive(Default)]
pub(crate) struct OneGuest {
    latest: BTreeMap<ServerId, Incarnation>,
    writes: u64,
}

impl OneGuest {
    /// A guest's process was started.
    pub(crate) fn started(&mut self, id: &ServerId, host: HostId, nonce: u64, generation: u64) {
        let this = Incarnation { nonce, host, generation };
        let latest = self.latest.entry(id.clone()).or_insert(this);
        if generation >= latest.generation {
            *latest = this;
        }
    }

    /// A write of a guest landed on one of its disks.
    pub(crate) fn wrote(&mut self, id: &ServerId, host: HostId, nonce: u64) -> Result<(), String> {
        self.writes += 1;
        match self.latest.get(id) {
            Some(latest) if latest.nonce != nonce => Err(format!(
                "server {id} wrote on host {host} after its generation {} had started on host {}",
                latest.generation, latest.host
            )),
            _ => Ok(()),
        }
    }

    /// How many writes landed.
    pub(crate) fn writes(&self) -> u64 {
        self.writes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_of_an_earlier_start_is_found() {
        let mut checker = OneGuest::default();
        let id = ServerId::from("s");
        checker.started(&id, HostId(1), 1, 1);
        assert!(checker.wrote(&id, HostId(1), 1).is_ok());
        checker.started(&id, HostId(2), 2, 2);
        assert!(checker.wrote(&id, HostId(2), 2).is_ok());
        assert!(checker.wrote(&id, HostId(1), 1).is_err());
    }
}
