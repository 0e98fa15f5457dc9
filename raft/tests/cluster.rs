//! Three nodes in one process, over real TLS sockets and real directories.

mod support;

use std::{sync::Arc, time::Duration};

use raft::{
    CallError, Client, Config, Prepare, ProposeError, Raft, StartError, Unprepared, WalError,
};
use support::{Authority, CLUSTER, Cluster, Echo, PATIENCE, Store, id, put};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_through_any_node_is_read_on_every_node() {
    let cluster = Cluster::start().await;
    for (number, node) in cluster.nodes.values().enumerate() {
        let number = number as u64;
        put(node, number, "written").await;
        for reader in cluster.nodes.values() {
            let view = reader.read().await.expect("read");
            assert_eq!(view.values[&format!("key-{number}")], "written");
        }
    }
    let status = cluster.node(1).status();
    assert_eq!(status.members.iter().filter(|member| member.voter).count(), 3);
    assert_eq!(status.members[1].name, "host-2");
    assert!(status.failure.is_none());
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_learns_of_a_commit_without_waiting_for_a_heartbeat() {
    // The next heartbeat would be an hour away, so only an immediate notice can bring the commit.
    let cluster = Cluster::start_with(|config| {
        config.heartbeat_ms = 3_600_000;
        config.election_ms_min = 7_200_000;
        config.election_ms_max = 8_000_000;
    })
    .await;
    let leader = cluster.node(cluster.leader().await);
    for number in 0..20 {
        let index = put(&leader, number, "x").await;
        for node in cluster.nodes.values() {
            let mut applied = node.applied();
            tokio::time::timeout(PATIENCE, applied.wait_for(|applied| *applied >= index))
                .await
                .expect("the follower heard of the commit")
                .expect("running");
        }
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_command_id_is_applied_once_and_answers_the_same() {
    let cluster = Cluster::start().await;
    let node = cluster.node(cluster.follower().await);
    let first = node.propose(id(7), b"a=1".to_vec()).await.expect("first");
    let again = node.propose(id(7), b"a=1".to_vec()).await.expect("again");
    assert_eq!(first.outcome, again.outcome);
    assert!(again.index > first.index);
    assert_eq!(node.read().await.expect("read").applied, 1);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cluster_goes_on_without_its_leader_which_catches_up_when_it_returns() {
    let mut cluster = Cluster::start().await;
    let old = cluster.leader().await;
    put(&cluster.node(old), 0, "before").await;
    cluster.stop(old).await;

    let other = *cluster.nodes.keys().next().expect("two are left");
    put(&cluster.node(other), 1, "without").await;
    let new = cluster.leader().await;
    assert_ne!(new, old);

    cluster.restart(old).await;
    let view = cluster.node(old).read().await.expect("read on the returned node");
    assert_eq!(view.values["key-0"], "before");
    assert_eq!(view.values["key-1"], "without");
    put(&cluster.node(old), 2, "through the returned node").await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proposals_that_race_a_leader_change_are_each_applied_exactly_once() {
    let mut cluster = Cluster::start().await;
    let old = cluster.leader().await;
    let survivor = cluster.node(cluster.follower().await);
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..8u64 {
        let survivor = survivor.clone();
        writers.spawn(async move {
            for number in 0..25 {
                put(&survivor, writer * 100 + number, "x").await;
            }
        });
    }
    cluster.stop(old).await;
    while let Some(done) = writers.join_next().await {
        done.expect("every proposal gets its outcome");
    }
    let view = survivor.read().await.expect("read");
    assert_eq!((view.applied, view.values.len()), (200, 200));
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_away_too_long_is_brought_back_by_a_snapshot() {
    let mut cluster = Cluster::start_with(|config| {
        config.snapshot_every = 20;
        config.keep_entries = 5;
    })
    .await;
    let away = cluster.follower().await;
    cluster.stop(away).await;
    let leader = cluster.node(cluster.leader().await);
    let large = "v".repeat(100_000);
    for number in 0..60 {
        put(&leader, number, &large).await;
    }
    cluster
        .eventually("the log to be purged", || leader.status().purged.filter(|purged| *purged > 20))
        .await;

    cluster.restart(away).await;
    let returned = cluster.node(away);
    let view = returned.read().await.expect("read");
    assert_eq!(view.values.len(), 60);
    assert_eq!(view.values["key-59"], large);
    assert!(returned.status().snapshot.is_some(), "it got a snapshot");

    // And everything survives a restart of all, from snapshots and logs.
    let expected = leader.read().await.expect("read");
    for id in [1, 2, 3] {
        cluster.stop(id).await;
    }
    for id in [1, 2, 3] {
        cluster.restart(id).await;
    }
    for node in cluster.nodes.values() {
        assert_eq!(node.read().await.expect("read"), expected);
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_minority_refuses_reads_and_writes() {
    let mut cluster = Cluster::start_with(|config| {
        config.propose_deadline = Duration::from_secs(3);
        config.read_deadline = Duration::from_secs(2);
    })
    .await;
    let leader = cluster.leader().await;
    for id in [1, 2, 3].into_iter().filter(|id| *id != leader) {
        cluster.stop(id).await;
    }
    let alone = cluster.node(leader);
    alone.read().await.expect_err("no quorum confirms that it leads");
    alone.propose(id(1), b"a=1".to_vec()).await.expect_err("no quorum takes it");
    assert!(alone.view().values.is_empty());
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_reach_peers_with_the_callers_authenticated_id() {
    let mut cluster = Cluster::start().await;
    let caller = cluster.node(2);
    for peer in 1..=3u64 {
        let answer = caller.call(peer, b"hi".to_vec(), PATIENCE).await.expect("answer");
        assert_eq!(answer, format!("2>{peer} hi").into_bytes());
    }
    let large = vec![7; 5 << 20];
    let answer = caller.call(3, large.clone(), PATIENCE).await.expect("answer");
    assert_eq!(answer[4..], large);
    let unknown = caller.call(9, Vec::new(), PATIENCE).await;
    assert!(matches!(unknown, Err(CallError::UnknownNode(9))));
    cluster.stop(3).await;
    let stopped = caller.call(3, Vec::new(), PATIENCE).await;
    assert!(
        matches!(stopped, Err(CallError::Unreachable { .. } | CallError::NoAnswer { .. })),
        "{stopped:?}"
    );
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certified_node_that_is_no_member_yet_can_call() {
    let cluster = Cluster::start().await;
    let tls = cluster.authority.node(&CLUSTER, 4);
    let address = cluster.address(2);
    let call = |tls, cluster_id, me| async move {
        Client::call(address, &tls, cluster_id, me, b"join".to_vec(), PATIENCE).await
    };
    let answer = call(tls.clone(), CLUSTER, 4).await.expect("answer");
    assert_eq!(answer, b"4>2 join");

    let in_anothers_name = call(tls, CLUSTER, 3).await;
    assert!(
        matches!(&in_anothers_name, Err(CallError::Unreachable { reason, .. }) if reason.contains("does not name node 3")),
        "{in_anothers_name:?}"
    );
    let other = [9; 16];
    let wrong_cluster = call(cluster.authority.node(&other, 4), other, 4).await;
    assert!(
        matches!(&wrong_cluster, Err(CallError::Unreachable { reason, .. }) if reason.contains("another cluster")),
        "{wrong_cluster:?}"
    );
    call(Authority::new().node(&CLUSTER, 4), CLUSTER, 4)
        .await
        .expect_err("a foreign authority's certificate is refused");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_a_foreign_certificate_never_becomes_a_voter() {
    let mut cluster = Cluster::start_with(|config| {
        config.propose_deadline = Duration::from_secs(3);
    })
    .await;
    let mut foreign = cluster.config(4);
    foreign.tls = Authority::new().node(&CLUSTER, 4);
    cluster.launch(foreign).await;
    let refused = cluster.node(1).add_voter(4, cluster.member(4)).await;
    assert!(refused.is_err(), "{refused:?}");
    let status = cluster.node(cluster.node(1).status().leader.expect("leader")).status();
    assert!(status.members.iter().all(|member| member.id != 4 || !member.voter));
    put(&cluster.node(1), 1, "the others go on").await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_is_added_through_a_follower_and_again_without_effect() {
    let mut cluster = Cluster::start().await;
    let follower = cluster.node(cluster.follower().await);
    let config = cluster.config(4);
    cluster.launch(config).await;
    for _ in 0..2 {
        follower.add_voter(4, cluster.member(4)).await.expect("added");
    }
    let members = follower.status().members;
    assert_eq!(members.iter().filter(|member| member.voter).count(), 4);
    put(&cluster.node(4), 1, "through the new one").await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_node_is_a_cluster_and_keeps_its_state_over_a_restart() {
    let mut cluster = alone();
    let config = cluster.config(1);
    cluster.launch(config).await;
    let node = cluster.node(1);
    node.bootstrap(cluster.member(1)).await.expect("bootstrap");
    put(&node, 1, "kept").await;
    cluster.stop(1).await;
    cluster.restart(1).await;
    let node = cluster.node(1);
    node.bootstrap(cluster.member(1)).await.expect("no effect on a cluster");
    let view = node.read().await.expect("read");
    assert_eq!(view.values["key-1"], "kept");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_lost_its_disk_does_not_stop_the_others() {
    let mut cluster = Cluster::start().await;
    let leader = cluster.leader().await;
    let wiped = cluster.follower().await;
    put(&cluster.node(leader), 1, "before").await;
    cluster.stop(wiped).await;
    std::fs::remove_dir_all(&cluster.configs[&wiped].directory).expect("wipe");
    cluster.restart(wiped).await;
    for number in 2..10 {
        put(&cluster.node(leader), number, "after").await;
    }
    let status = cluster.node(leader).status();
    assert_eq!((status.leader, status.failure), (Some(leader), None));
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_disk_fails_says_so_and_refuses_everything() {
    let mut cluster = alone();
    let config = cluster.config(1);
    cluster.launch(config).await;
    let node = cluster.node(1);
    node.bootstrap(cluster.member(1)).await.expect("bootstrap");
    put(&node, 1, "fine").await;
    // The next log segment can't be made any more.
    std::fs::remove_dir_all(&cluster.configs[&1].directory).expect("remove");
    let mut outcome = Ok(());
    for number in 2..40 {
        let command = vec![b'x'; 900_000];
        outcome = node.propose(id(number), command).await.map(drop);
        if outcome.is_err() {
            break;
        }
    }
    assert!(matches!(outcome, Err(ProposeError::Stopped(_))), "{outcome:?}");
    let reason = node.failure().borrow().clone().expect("a reason");
    assert!(reason.contains("can't write the log"), "{reason}");
    assert_eq!(node.status().failure, Some(reason));
    node.read().await.expect_err("no reads from a node that failed");
    cluster.stop_all().await;
}

struct Suffix;

impl Prepare for Suffix {
    fn prepare(&self, mut command: Vec<u8>) -> raft::Prepared {
        command.extend_from_slice(b" prepared");
        raft::Prepared::bare(command)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leader_prepares_each_command_before_it_is_replicated() {
    let cluster = alone();
    let node =
        Raft::start(cluster.config(1), Store::default(), Arc::new(Suffix), Arc::new(Echo(1)))
            .await
            .expect("start");
    let me = raft::Member { address: node.listen_address(), name: "one".to_owned() };
    node.bootstrap(me).await.expect("bootstrap");
    put(&node, 1, "value").await;
    assert_eq!(node.view().values["key-1"], "value prepared");
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_start_says_why() {
    let mut cluster = alone();
    let config = cluster.config(1);
    cluster.launch(config).await;

    let taken = start(cluster.config(1)).await;
    assert!(matches!(taken, Err(StartError::Log(WalError::Locked { .. }))), "{taken:?}");

    let mut port_taken = cluster.config(2);
    port_taken.listen = cluster.address(1);
    let port_taken = start(port_taken).await;
    assert!(matches!(port_taken, Err(StartError::Listen { .. })), "{port_taken:?}");

    let mut everywhere = cluster.config(2);
    everywhere.listen = "0.0.0.0:0".parse().expect("address");
    let everywhere = start(everywhere).await;
    assert!(matches!(everywhere, Err(StartError::Config(_))), "{everywhere:?}");

    let mut anothers_name = cluster.config(2);
    anothers_name.tls = cluster.authority.node(&CLUSTER, 3);
    let anothers_name = start(anothers_name).await;
    assert!(matches!(anothers_name, Err(StartError::Tls(_))), "{anothers_name:?}");

    cluster.stop(1).await;
    let mut another_node = cluster.config(2);
    another_node.directory = cluster.config(1).directory;
    let another_node = start(another_node).await;
    assert!(
        matches!(another_node, Err(StartError::Log(WalError::WrongIdentity { .. }))),
        "{another_node:?}"
    );
}

fn alone() -> Cluster {
    Cluster {
        authority: Authority::new(),
        nodes: Default::default(),
        configs: Default::default(),
        directory: tempfile::tempdir().expect("temporary directory"),
    }
}

async fn start(config: Config) -> Result<Raft<Store>, StartError> {
    Raft::start(config, Store::default(), Arc::new(Unprepared), Arc::new(Echo(1))).await
}
