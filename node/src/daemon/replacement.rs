//! The leader finishes replacements: once the new node votes, the dead one leaves consensus; once
//! nothing is left on it, its host leaves the state. Looked at again and again, so that it does not
//! matter who was leader when, or where it stopped.

use super::Node;
use super::administration::Held;
use anyhow::{Context, Result, bail};
use controller::ids::HostId;
use controller::state::cluster::ClusterCommand;
use controller::state::{Command, State, decode_result};
use std::sync::Arc;
use std::time::Duration;

/// How often the leader looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Looks until the node ends.
pub(super) async fn run(node: Arc<Node>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let Ok(raft) = node.raft() else { continue };
        if !raft.is_leader() {
            continue;
        }
        for step in steps(&raft.view(), &raft.status().members) {
            if let Err(error) = perform(&node, step).await {
                tracing::warn!("a replacement does not go on yet: {error:#}");
            }
        }
    }
}

/// What is left to be done for a replaced host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    LeaveConsensus(HostId),
    LeaveState(HostId),
}

/// Pure: what the state and the membership leave to be done.
fn steps(state: &State, members: &[raft::MemberStatus]) -> Vec<Step> {
    let voter = |id: HostId| members.iter().any(|member| member.id == id.0 && member.voter);
    let member = |id: HostId| members.iter().any(|member| member.id == id.0);
    let replaced = state.cluster.hosts.values().filter_map(|host| Some((host, host.replaced_by?)));
    replaced
        .filter_map(|(host, by)| {
            if member(host.id) {
                voter(by).then_some(Step::LeaveConsensus(host.id))
            } else {
                Held::by(state, host.id).is_empty().then_some(Step::LeaveState(host.id))
            }
        })
        .collect()
}

async fn perform(node: &Node, step: Step) -> Result<()> {
    let raft = node.raft()?;
    match step {
        Step::LeaveConsensus(host) => {
            raft.remove_voter(host.0).await?;
            tracing::info!(%host, "a replaced host has left consensus");
        }
        Step::LeaveState(host) => {
            let command = Command::Cluster(ClusterCommand::RemoveHost { id: host, force: false });
            let id = *uuid::Uuid::new_v4().as_bytes();
            let proposed = raft.propose(id, command.encode()).await?;
            if let Err(rejection) = decode_result(&proposed.outcome).context("an outcome")? {
                bail!("host {host}: {rejection}");
            }
            tracing::info!(%host, "a replaced host is gone");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64, voter: bool) -> raft::MemberStatus {
        raft::MemberStatus {
            id,
            address: String::new(),
            name: format!("node{id}"),
            voter,
            matched: None,
        }
    }

    #[test]
    fn a_replaced_host_leaves_consensus_once_the_new_one_votes_and_then_the_state() {
        let mut state = State::default();
        for id in 1..=4 {
            let host = super::super::tests::host(id);
            state.cluster.hosts.insert(host.id, host);
        }
        let check = |state: &State, members: &[raft::MemberStatus], expected: &[Step]| {
            assert_eq!(steps(state, members), expected);
        };
        let old = [member(1, true), member(2, true), member(3, true)];
        check(&state, &old, &[]);
        if let Some(host) = state.cluster.hosts.get_mut(&HostId(3)) {
            host.replaced_by = Some(HostId(4));
        }
        check(&state, &old, &[]);
        let [one, two, three] = old;
        check(&state, &[one.clone(), two.clone(), three.clone(), member(4, false)], &[]);
        let leave = [Step::LeaveConsensus(HostId(3))];
        check(&state, &[one.clone(), two.clone(), three, member(4, true)], &leave);
        check(&state, &[one, two, member(4, true)], &[Step::LeaveState(HostId(3))]);
    }
}
