//! A host dies for good and another takes its place, as `trine cluster replace` does it: a token, a
//! new host with a new id, a voter more, the old one removed.

use std::time::Duration;

use controller::ids::HostId;
use controller::state::cluster::ClusterCommand;
use controller::state::{Command, Outcome, decode_result};

use crate::cluster::Cluster;
use crate::consensus::Node;
use crate::runtime;
use crate::setup;

/// How often each part is tried again.
const AGAIN: Duration = Duration::from_millis(700);

/// Replaces a host; returns when the new one is a voter and the old one is gone.
pub(crate) async fn replace(cluster: Cluster, old: HostId) {
    let world = cluster.world().clone();
    world.note(format_args!("host {old} dies for good"));
    cluster.retire(old);
    world.pause_ms(500, 20_000).await;
    let remove = Command::Cluster(ClusterCommand::RemoveHost { id: old, force: true });
    until_done(&cluster, &remove).await;
    let token = format!("token-instead-of-{old}");
    let issue = ClusterCommand::IssueJoinToken {
        hash: token.clone(),
        expires_ms: u64::MAX,
        replaces: None,
    };
    until_done(&cluster, &Command::Cluster(issue)).await;
    // Its name and addresses are a new host's: nothing of the old one's is known to it.
    let register = ClusterCommand::RegisterHost {
        token_hash: token,
        host: Box::new(setup::new_host(HostId(cluster.hosts() + 1))),
    };
    let Some(Outcome::Host(new)) = until_done(&cluster, &Command::Cluster(register)).await else {
        return;
    };
    let new = new.id;
    world.note(format_args!("host {new} takes the place of host {old}"));
    cluster.put_up(new);
    each_node_until(&cluster, move |node| async move { node.add(new).await }).await;
    each_node_until(&cluster, move |node| async move { node.remove(old).await }).await;
    world.note(format_args!("host {old} is out, host {new} is in"));
}

/// Proposes until there is an answer; what it was, where it was done.
async fn until_done(cluster: &Cluster, command: &Command) -> Option<Outcome> {
    let id = cluster.world().id();
    loop {
        for node in cluster.nodes() {
            if let Some(proposed) = node.propose_for(id, command.encode()).await {
                let result = decode_result(&proposed.outcome).ok()?;
                cluster.world().note(format_args!("{command:?}: {result:?}"));
                return result.ok();
            }
        }
        runtime::sleep(AGAIN).await;
    }
}

/// Asks one node after the other until one has done it.
async fn each_node_until<W>(cluster: &Cluster, ask: impl Fn(Node) -> W)
where
    W: Future<Output = Result<(), String>> + Send + 'static,
{
    loop {
        for node in cluster.nodes() {
            match node.within(ask(node.clone())).await {
                Some(Ok(())) => return,
                Some(Err(why)) => cluster.world().note(format_args!("not yet: {why}")),
                None => {}
            }
        }
        runtime::sleep(AGAIN).await;
    }
}
