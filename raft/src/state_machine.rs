//! Joins the caller's [`StateMachine`] to openraft: applies what is committed, publishes views,
//! builds and installs snapshots.

use std::{
    io,
    sync::{Arc, PoisonError, RwLock},
};

use futures::{Stream, StreamExt};
use openraft::{
    EntryPayload, OptionalSend, RaftSnapshotBuilder,
    storage::{ApplyResponder, EntryResponder, RaftStateMachine},
};
use tokio::sync::watch;

use crate::{
    Entry, StateMachine,
    disk::HostDisk,
    snapshot::{SNAPSHOT_BYTES_MAX, SnapshotFiles},
    types::{
        Command, LogEntry, LogId, Snapshot, SnapshotData, SnapshotMeta, StoredMembership, Types,
    },
};

/// What readers see of the state machine.
pub(crate) struct Published<S: StateMachine> {
    view: RwLock<S::View>,
    /// Index of the last applied entry; a new cluster's first entry has index 0.
    applied: watch::Sender<u64>,
}

impl<S: StateMachine> Published<S> {
    pub(crate) fn view(&self) -> S::View {
        self.view.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn applied(&self) -> watch::Receiver<u64> {
        self.applied.subscribe()
    }

    fn publish(&self, view: S::View, applied: Option<LogId>) {
        *self.view.write().unwrap_or_else(PoisonError::into_inner) = view;
        if let Some(log_id) = applied {
            self.applied.send_replace(log_id.index);
        }
    }
}

/// The state machine as openraft drives it.
pub(crate) struct Machine<S: StateMachine> {
    state: S,
    last_applied: Option<LogId>,
    membership: StoredMembership,
    time_ms: u64,
    published: Arc<Published<S>>,
    files: SnapshotFiles<HostDisk>,
}

impl<S: StateMachine> Machine<S> {
    pub(crate) fn new(state: S, files: SnapshotFiles<HostDisk>) -> Self {
        let published =
            Arc::new(Published { view: RwLock::new(state.view()), applied: watch::Sender::new(0) });
        Self {
            state,
            last_applied: None,
            membership: StoredMembership::default(),
            time_ms: 0,
            published,
            files,
        }
    }

    pub(crate) fn published(&self) -> Arc<Published<S>> {
        self.published.clone()
    }

    fn apply_one(&mut self, entry: LogEntry) -> Vec<u8> {
        self.last_applied = Some(entry.log_id);
        match entry.payload {
            EntryPayload::Blank => Vec::new(),
            EntryPayload::Normal(command) => self.apply_command(entry.log_id.index, command),
            EntryPayload::Membership(membership) => {
                self.membership = StoredMembership::new(Some(entry.log_id), membership);
                Vec::new()
            }
        }
    }

    fn apply_command(&mut self, index: u64, command: Command) -> Vec<u8> {
        self.time_ms = self.time_ms.max(command.time_ms);
        self.state.apply(&Entry {
            index,
            time_ms: self.time_ms,
            command_id: command.id,
            command: command.data.to_vec(),
        })
    }
}

impl<S: StateMachine> RaftStateMachine<Types> for Machine<S> {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Builder<S>;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.last_applied, self.membership.clone()))
    }

    async fn apply<T>(&mut self, mut entries: T) -> Result<(), io::Error>
    where
        T: Stream<Item = Result<EntryResponder<Types>, io::Error>> + Unpin + OptionalSend,
    {
        let mut answers: Vec<(ApplyResponder<Types>, Vec<u8>)> = Vec::new();
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            let outcome = self.apply_one(entry);
            if let Some(responder) = responder {
                answers.push((responder, outcome));
            }
        }
        // The view comes first: whoever is answered must find its own write in it.
        self.published.publish(self.state.view(), self.last_applied);
        for (responder, outcome) in answers {
            responder.send(outcome);
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        Builder {
            view: self.state.view(),
            meta: SnapshotMeta {
                last_log_id: self.last_applied,
                last_membership: self.membership.clone(),
            },
            time_ms: self.time_ms,
            files: self.files.clone(),
        }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotData,
    ) -> Result<(), io::Error> {
        let (files, saved_meta) = (self.files.clone(), meta.clone());
        let (state, snapshot) = blocking(move || {
            let state = S::restore(&snapshot.state).map_err(|reason| {
                io::Error::other(format!("can't restore a snapshot: {reason}"))
            })?;
            files.save(&saved_meta, &snapshot).map_err(io::Error::other)?;
            Ok((state, snapshot))
        })
        .await?;
        self.state = state;
        self.time_ms = snapshot.time_ms;
        self.last_applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.published.publish(self.state.view(), self.last_applied);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        let files = self.files.clone();
        blocking(move || files.newest().map_err(io::Error::other)).await
    }
}

/// Writes one view as a snapshot file while `apply` goes on.
pub(crate) struct Builder<S: StateMachine> {
    view: S::View,
    meta: SnapshotMeta,
    time_ms: u64,
    files: SnapshotFiles<HostDisk>,
}

impl<S: StateMachine> RaftSnapshotBuilder<Types> for Builder<S> {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let view = self.view.clone();
        let (files, meta, time_ms) = (self.files.clone(), self.meta.clone(), self.time_ms);
        blocking(move || {
            let state = S::snapshot(&view);
            if state.len() > SNAPSHOT_BYTES_MAX {
                return Err(io::Error::other(format!(
                    "a snapshot of {} bytes is over the limit of {SNAPSHOT_BYTES_MAX}",
                    state.len()
                )));
            }
            let snapshot = SnapshotData { time_ms, state: Arc::new(state) };
            files.save(&meta, &snapshot).map_err(io::Error::other)?;
            Ok(Snapshot { meta, snapshot })
        })
        .await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(io::Error::other(error)))
}
