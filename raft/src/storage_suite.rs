//! openraft's own test suite of log storage and state machine, on real files.

use std::sync::Arc;

use openraft::{
    StorageError,
    testing::log::{StoreBuilder, Suite},
};
use tempfile::TempDir;

use crate::{
    Entry, StateMachine,
    disk::HostDisk,
    log_store::LogStore,
    snapshot::SnapshotFiles,
    state_machine::Machine,
    types::Types,
    wal::{Identity, Opening, WalOptions},
};

/// A state that remembers the indexes it saw.
struct Indexes(Vec<u8>);

impl StateMachine for Indexes {
    type View = Vec<u8>;

    fn apply(&mut self, entry: &Entry) -> Vec<u8> {
        self.0.push(entry.index as u8);
        Vec::new()
    }

    fn view(&self) -> Vec<u8> {
        self.0.clone()
    }

    fn snapshot(view: &Vec<u8>) -> Vec<u8> {
        view.clone()
    }

    fn restore(bytes: &[u8]) -> Result<Self, String> {
        Ok(Self(bytes.to_vec()))
    }
}

struct Files;

impl StoreBuilder<Types, LogStore, Machine<Indexes>, TempDir> for Files {
    async fn build(&self) -> Result<(TempDir, LogStore, Machine<Indexes>), StorageError<Types>> {
        let directory = tempfile::tempdir().expect("temporary directory");
        let identity = Identity { cluster_id: [1; 16], node_id: 0 };
        let opening = Opening::begin(
            HostDisk,
            WalOptions {
                directory: directory.path().to_owned(),
                identity,
                segment_bytes: 1 << 16,
                fresh_incarnation: [2; 16],
            },
        );
        let opened = opening.expect("open").finish(None).expect("open");
        opened.wal.start_thread(opened.writer).expect("start");
        let files = SnapshotFiles::open(HostDisk, directory.path().join("snapshots"), identity)
            .expect("open");
        let log = LogStore::new(opened.wal.into(), opened.recovered);
        Ok((directory, log, Machine::new(Indexes(Vec::new()), Arc::new(files))))
    }
}

#[test]
fn openrafts_storage_suite_passes() {
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    runtime.block_on(Suite::test_all(Files)).expect("every storage test passes");
}
