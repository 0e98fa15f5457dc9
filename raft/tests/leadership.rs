//! Leadership that is handed over on purpose. Elections are hours away, so only the hand-over
//! itself can make another node lead.

mod support;

use std::time::Duration;

use raft::TransferError;
use support::{Cluster, PATIENCE, put};

async fn cluster_without_elections() -> Cluster {
    Cluster::start_with(|config| {
        config.election_ms_min = 7_200_000;
        config.election_ms_max = 8_000_000;
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_hands_over_to_the_voter_that_was_chosen() {
    let cluster = cluster_without_elections().await;
    for (from, to) in [(1, 3), (3, 2), (2, 1)] {
        put(&cluster.node(from), from, "x").await;
        cluster.node(from).transfer_leader(to).await.expect("handed over");
        assert_eq!(cluster.leader().await, to);
        put(&cluster.node(from), 100 + from, "x").await;
    }
    cluster.node(1).transfer_leader(1).await.expect("it leads already");
    let error = cluster.node(2).transfer_leader(3).await.unwrap_err();
    assert!(matches!(error, TransferError::NotLeader { me: 2 }), "{error}");
    let error = cluster.node(1).transfer_leader(9).await.unwrap_err();
    assert!(matches!(error, TransferError::NotVoter { to: 9 }), "{error}");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_stops_as_planned_costs_no_election_timeout() {
    let mut cluster = cluster_without_elections().await;
    let leader = cluster.leader().await;
    cluster.node(leader).hand_over(PATIENCE).await;
    cluster.stop(leader).await;
    let next = cluster.leader().await;
    assert_ne!(next, leader);
    put(&cluster.node(next), 1, "x").await;
    // A follower has nothing to hand over.
    let follower = cluster.follower().await;
    cluster.node(follower).hand_over(Duration::from_secs(1)).await;
    assert_eq!(cluster.leader().await, next);
    cluster.stop_all().await;
}
