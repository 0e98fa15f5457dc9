//! A host's id is given once: what grows never shrinks, and a new host is above all before it.

use controller::state::State;

/// Whether ids of hosts only grow.
pub(super) fn never_reused(before: &State, after: &State) -> Result<(), String> {
    if after.cluster.id != before.cluster.id {
        return Ok(());
    }
    if after.cluster.next_host_id < before.cluster.next_host_id {
        return Err("the next host's id went back".into());
    }
    let new = after.cluster.hosts.keys().filter(|id| !before.cluster.hosts.contains_key(*id));
    match new.into_iter().find(|id| id.0 < before.cluster.next_host_id) {
        Some(id) => Err(format!("host {id} has an id that was given before")),
        None => Ok(()),
    }
}
