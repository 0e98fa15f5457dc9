//! Joins the caller's [`StateMachine`] to openraft: applies what is committed, publishes views,
//! builds and installs snapshots.

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, PoisonError, RwLock},
};

use futures::{Stream, StreamExt};
use openraft::{
    EntryPayload, OptionalSend, RaftSnapshotBuilder,
    storage::{ApplyResponder, EntryResponder, RaftStateMachine},
};

use crate::{
    Entry, NodeId, SnapshotError, StateMachine,
    codec::REMOVED_MAX,
    runtime::{blocking, sleep},
    snapshot::{SNAPSHOT_BYTES_MAX, Snapshots},
    types::{
        Command, LogEntry, LogId, Membership, Snapshot, SnapshotData, SnapshotMeta,
        StoredMembership, Types,
    },
    wal::{SPACE_PAUSE, is_no_space},
    watch,
};

/// A state with where in the log it is.
#[derive(Clone)]
pub(crate) struct Picture<V> {
    pub(crate) view: V,
    pub(crate) last_applied: Option<LogId>,
    pub(crate) membership: Arc<StoredMembership>,
    pub(crate) removed: Arc<BTreeSet<NodeId>>,
    pub(crate) time_ms: u64,
}

/// What readers see of the state machine.
pub(crate) struct Published<S: StateMachine> {
    picture: RwLock<Picture<S::View>>,
    /// Index of the last applied entry; a new cluster's first entry has index 0.
    applied: watch::Sender<u64>,
}

impl<S: StateMachine> Published<S> {
    pub(crate) fn view(&self) -> S::View {
        self.picture.read().unwrap_or_else(PoisonError::into_inner).view.clone()
    }

    pub(crate) fn picture(&self) -> Picture<S::View> {
        self.picture.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn applied(&self) -> watch::Receiver<u64> {
        self.applied.subscribe()
    }

    fn publish(&self, picture: Picture<S::View>) {
        let applied = picture.last_applied;
        *self.picture.write().unwrap_or_else(PoisonError::into_inner) = picture;
        if let Some(log_id) = applied {
            self.applied.send_replace(log_id.index);
        }
    }
}

/// The state machine as openraft drives it.
pub(crate) struct Machine<S: StateMachine> {
    state: S,
    last_applied: Option<LogId>,
    membership: Arc<StoredMembership>,
    /// Ids that were members once: they never come back.
    removed: Arc<BTreeSet<NodeId>>,
    time_ms: u64,
    published: Arc<Published<S>>,
    files: Arc<dyn Snapshots>,
    /// The newest snapshot as it was read at the start, until something comes after it.
    opened: Option<Snapshot>,
}

impl<S: StateMachine> Machine<S> {
    pub(crate) fn new(state: S, files: Arc<dyn Snapshots>) -> Self {
        let picture = Picture {
            view: state.view(),
            last_applied: None,
            membership: Arc::default(),
            removed: Arc::default(),
            time_ms: 0,
        };
        let published =
            Arc::new(Published { picture: RwLock::new(picture), applied: watch::Sender::new(0) });
        Self {
            state,
            last_applied: None,
            membership: Arc::default(),
            removed: Arc::default(),
            time_ms: 0,
            published,
            files,
            opened: None,
        }
    }

    /// Goes on from the newest snapshot, where there is one.
    pub(crate) async fn open(
        state: S,
        files: Arc<dyn Snapshots>,
        newest: Option<Snapshot>,
    ) -> Result<Self, io::Error> {
        let mut machine = Self::new(state, files);
        if let Some(Snapshot { meta, snapshot }) = newest {
            let state = restored(&snapshot).await?;
            machine.become_snapshot(state, &meta, snapshot.clone());
            machine.opened = Some(Snapshot { meta, snapshot });
        }
        Ok(machine)
    }

    fn become_snapshot(&mut self, state: S, meta: &SnapshotMeta, snapshot: SnapshotData) {
        self.opened = None;
        self.state = state;
        self.time_ms = snapshot.time_ms;
        self.removed = Arc::new(snapshot.removed);
        self.last_applied = meta.last_log_id;
        self.membership = Arc::new(meta.last_membership.clone());
        self.published.publish(self.picture());
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
                self.note_removed(&membership);
                self.membership = Arc::new(StoredMembership::new(Some(entry.log_id), membership));
                Vec::new()
            }
        }
    }

    fn note_removed(&mut self, next: &Membership) {
        let gone: Vec<NodeId> = self
            .membership
            .nodes()
            .map(|(id, _)| *id)
            .filter(|id| next.get_node(id).is_none())
            .collect();
        if gone.is_empty() {
            return;
        }
        let removed = Arc::make_mut(&mut self.removed);
        removed.extend(gone);
        while removed.len() > REMOVED_MAX {
            removed.pop_first();
        }
    }

    fn picture(&self) -> Picture<S::View> {
        Picture {
            view: self.state.view(),
            last_applied: self.last_applied,
            membership: self.membership.clone(),
            removed: self.removed.clone(),
            time_ms: self.time_ms,
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
        Ok((self.last_applied, StoredMembership::clone(&self.membership)))
    }

    async fn apply<T>(&mut self, mut entries: T) -> Result<(), io::Error>
    where
        T: Stream<Item = Result<EntryResponder<Types>, io::Error>> + Unpin + OptionalSend,
    {
        self.opened = None;
        let mut answers: Vec<(ApplyResponder<Types>, Vec<u8>)> = Vec::new();
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            let outcome = self.apply_one(entry);
            if let Some(responder) = responder {
                answers.push((responder, outcome));
            }
        }
        // The view comes first: whoever is answered must find its own write in it.
        self.published.publish(self.picture());
        for (responder, outcome) in answers {
            responder.send(outcome);
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self::SnapshotBuilder {
        Builder { picture: self.picture(), files: self.files.clone() }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotData,
    ) -> Result<(), io::Error> {
        let state = restored(&snapshot).await?;
        saved(&self.files, meta, &snapshot).await?;
        self.become_snapshot(state, meta, snapshot);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        if let Some(opened) = &self.opened {
            return Ok(Some(opened.clone()));
        }
        let files = self.files.clone();
        blocking(move || files.newest().map_err(io::Error::other)).await
    }
}

/// Writes one view as a snapshot file while `apply` goes on.
pub(crate) struct Builder<S: StateMachine> {
    picture: Picture<S::View>,
    files: Arc<dyn Snapshots>,
}

impl<S: StateMachine> RaftSnapshotBuilder<Types> for Builder<S> {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let (files, picture) = (self.files.clone(), self.picture.clone());
        let snapshot = blocking(move || Self::encode(&picture)).await?;
        saved(&files, &snapshot.meta, &snapshot.snapshot).await?;
        Ok(snapshot)
    }
}

impl<S: StateMachine> Builder<S> {
    fn encode(picture: &Picture<S::View>) -> io::Result<Snapshot> {
        let state = S::snapshot(&picture.view);
        if state.len() > SNAPSHOT_BYTES_MAX {
            return Err(io::Error::other(format!(
                "a snapshot of {} bytes is over the limit of {SNAPSHOT_BYTES_MAX}",
                state.len()
            )));
        }
        let snapshot = SnapshotData {
            time_ms: picture.time_ms,
            removed: BTreeSet::clone(&picture.removed),
            state: Arc::new(state),
        };
        let meta = SnapshotMeta {
            last_log_id: picture.last_applied,
            last_membership: StoredMembership::clone(&picture.membership),
        };
        Ok(Snapshot { meta, snapshot })
    }
}

async fn restored<S: StateMachine>(snapshot: &SnapshotData) -> Result<S, io::Error> {
    let bytes = snapshot.state.clone();
    blocking(move || {
        S::restore(&bytes)
            .map_err(|reason| io::Error::other(format!("can't restore a snapshot: {reason}")))
    })
    .await
}

/// Saves a snapshot; waits for space as long as there is none, because openraft stops a node whose
/// snapshot fails, and a full disk must not.
async fn saved(
    files: &Arc<dyn Snapshots>,
    meta: &SnapshotMeta,
    data: &SnapshotData,
) -> io::Result<()> {
    loop {
        let (files, meta, data) = (files.clone(), meta.clone(), data.clone());
        match blocking(move || Ok(files.save(&meta, &data))).await? {
            Err(SnapshotError::Io { source, path, .. }) if is_no_space(&source) => {
                tracing::error!(path = %path.display(), "a snapshot waits for space");
                sleep(SPACE_PAUSE).await;
            }
            result => return result.map_err(io::Error::other),
        }
    }
}
