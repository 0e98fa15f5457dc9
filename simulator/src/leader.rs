//! What a leader does beside answering: fences silent hosts, has their servers made anew elsewhere,
//! and whatever else `controller::plan::leading` finds due.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use controller::ids::HostId;
use controller::plan::leading::{Chore, Ending, Leading};
use controller::state::decode_result;

use crate::consensus::Node;
use crate::heartbeat::{Table, clock};
use crate::runtime;
use crate::world::World;

/// How often the leader looks.
const EVERY: Duration = Duration::from_millis(500);

/// What leaders' wall clocks show when a run begins, as `raft::sim` has it.
const DAY_MS: u64 = 1_800_000_000_000;

/// A leader's loop. Clones are the same.
#[derive(Clone)]
struct Leader {
    world: World,
    host: HostId,
    raft: Node,
    table: Table,
    leading: Arc<Mutex<Leading>>,
}

/// Looks as long as the node lives.
pub(crate) async fn lead(world: World, host: HostId, raft: Node, table: Table) {
    let leader = Leader { world, host, raft, table, leading: Arc::default() };
    loop {
        runtime::sleep(EVERY).await;
        let now = clock(&leader.world, host);
        let leads = leader.raft.leads();
        leader.table.lock().lead(leads, now);
        if leads.is_none() {
            continue;
        }
        let state = leader.raft.view();
        let day_ms =
            DAY_MS + u64::try_from(runtime::now().as_millis()).unwrap_or(u64::MAX - DAY_MS);
        let due = leader.leading().due(&state, &mut leader.table.lock(), now, day_ms);
        for chore in due {
            runtime::spawn_on(host, leader.clone().perform(chore));
        }
    }
}

impl Leader {
    fn leading(&self) -> MutexGuard<'_, Leading> {
        self.leading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn perform(self, chore: Chore) {
        let id = self.world.id();
        let proposed = self.raft.propose(id, chore.command.encode()).await;
        let result = proposed.ok().and_then(|proposed| decode_result(&proposed.outcome).ok());
        let words = match &result {
            None => "no answer".to_owned(),
            Some(Ok(_)) => "done".to_owned(),
            Some(Err(why)) => format!("refused: {why}"),
        };
        self.world.note(format_args!("leader {} {:?}: {words}", self.host, chore.command));
        let ending = match result {
            None => Ending::Unknown,
            Some(Ok(_)) => Ending::Applied,
            Some(Err(_)) => Ending::Refused,
        };
        let now = clock(&self.world, self.host);
        self.leading().ended(&chore, &mut self.table.lock(), ending, now);
    }
}
