//! Damaged, wiped, removed and lost nodes: real directories, real sockets.

mod support;

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use raft::{
    AddVoterError, Config, Member, OfflineError, Raft, RecoverAlone, RemoveVoterError, Restore,
    StartError, Unprepared, inspect, read_backup, recover_alone, restore,
};
use support::{Authority, CLUSTER, Cluster, Echo, PATIENCE, Store, put};

const NEW_CLUSTER: [u8; 16] = [0xd2; 16];

/// Where the frames of a node's last log segment begin to differ from zeros: its first bytes.
fn segment(config: &Config) -> PathBuf {
    let mut paths: Vec<PathBuf> = fs::read_dir(&config.directory)
        .expect("list")
        .map(|item| item.expect("item").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "wal"))
        .collect();
    paths.sort_unstable();
    paths.pop().expect("a segment")
}

/// Flips a bit in the middle of what the segment holds.
fn flip_a_bit(config: &Config) {
    let path = segment(config);
    let mut bytes = fs::read(&path).expect("read");
    let end = bytes.iter().rposition(|byte| *byte != 0).expect("something");
    bytes[end / 2] ^= 0x10;
    fs::write(&path, bytes).expect("damage");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_log_is_healed_by_its_peers_and_the_node_votes_again() {
    let mut cluster = Cluster::start().await;
    let damaged = cluster.follower().await;
    let leader = cluster.node(cluster.leader().await);
    for number in 0..50 {
        put(&leader, number, "written").await;
    }
    cluster.stop(damaged).await;
    flip_a_bit(&cluster.configs[&damaged]);
    let looked = inspect(&cluster.configs[&damaged].directory).expect("inspect");
    assert!(looked.healing && looked.damage[0].contains("is damaged at byte"), "{looked:?}");
    // The same leader goes on, which still remembers what the node had acknowledged.
    put(&leader, 50, "meanwhile").await;
    cluster.restart(damaged).await;
    let node = cluster.node(damaged);
    cluster.eventually("the log to heal", || node.status().healing.is_none().then_some(())).await;
    let view = node.read().await.expect("read");
    assert_eq!(view.values.len(), 51);
    // It counts again: with the old leader gone it and the third node go on.
    let old = cluster.leader().await;
    let third = *cluster.nodes.keys().find(|id| **id != old && **id != damaged).expect("third");
    cluster.stop(old).await;
    put(&cluster.node(third), 51, "without the old leader").await;
    // And nothing reminds of the damage after a restart.
    cluster.stop(damaged).await;
    let looked = inspect(&cluster.configs[&damaged].directory).expect("inspect");
    assert!(!looked.healing && looked.damage.is_empty(), "{looked:?}");
    cluster.restart(damaged).await;
    assert!(cluster.node(damaged).status().healing.is_none());
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_lost_acknowledged_entries_elects_nobody_who_lacks_them() {
    let mut cluster = Cluster::start_with(|config| {
        config.propose_deadline = Duration::from_secs(4);
        config.read_deadline = Duration::from_secs(4);
    })
    .await;
    let holder = cluster.leader().await;
    let damaged = cluster.follower().await;
    let behind = *cluster.nodes.keys().find(|id| **id != holder && **id != damaged).expect("third");
    put(&cluster.node(holder), 0, "everywhere").await;
    cluster.stop(behind).await;
    for number in 1..30 {
        put(&cluster.node(holder), number, "on two").await;
    }
    cluster.stop(damaged).await;
    cluster.stop(holder).await;
    flip_a_bit(&cluster.configs[&damaged]);

    // The two that are left are a majority, and neither has all that was acknowledged.
    cluster.restart(damaged).await;
    cluster.restart(behind).await;
    cluster.node(behind).read().await.expect_err("nobody may lead");
    assert!(cluster.node(damaged).status().healing.is_some());

    cluster.restart(holder).await;
    for id in [damaged, behind] {
        let node = cluster.node(id);
        let healed = || node.status().healing.is_none().then_some(());
        cluster.eventually("the log to heal", healed).await;
        let view = cluster.eventually_reads(&node).await;
        assert_eq!(view.values.len(), 30, "node {id}");
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_snapshot_is_fetched_from_the_leader() {
    let mut cluster = Cluster::start_with(|config| {
        config.snapshot_every = 20;
        config.keep_entries = 5;
    })
    .await;
    let damaged = cluster.follower().await;
    let leader = cluster.node(cluster.leader().await);
    for number in 0..60 {
        put(&leader, number, "x").await;
    }
    let node = cluster.node(damaged);
    cluster.eventually("a purge", || node.status().purged.filter(|purged| *purged > 30)).await;
    drop(node);
    cluster.stop(damaged).await;
    let snapshots = cluster.configs[&damaged].directory.join("snapshots");
    for item in fs::read_dir(&snapshots).expect("list") {
        let path = item.expect("item").path();
        let mut bytes = fs::read(&path).expect("read");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).expect("damage");
    }
    cluster.restart(damaged).await;
    let node = cluster.node(damaged);
    cluster.eventually("the node to heal", || node.status().healing.is_none().then_some(())).await;
    assert_eq!(node.read().await.expect("read").values.len(), 60);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_only_voter_with_a_damaged_log_is_refused_and_can_be_recovered_as_far_as_it_goes() {
    let mut cluster = alone().await;
    for number in 0..40 {
        put(&cluster.node(1), number, "x").await;
    }
    cluster.stop(1).await;
    flip_a_bit(&cluster.configs[&1]);
    let refused = start(cluster.configs[&1].clone()).await.expect_err("nobody can heal it");
    assert!(refused.to_string().contains("only voter"), "{refused}");
    let config = new_home(&cluster, 1);
    let recovered = recover_alone(RecoverAlone {
        from: &cluster.configs[&1].directory,
        into: &config.directory,
        cluster_id: NEW_CLUSTER,
        member: cluster.member(1),
    })
    .expect("recover");
    assert!(!recovered.damage.is_empty(), "{recovered:?}");
    cluster.launch(config).await;
    let kept = cluster.node(1).read().await.expect("read").values.len();
    assert!((1..40).contains(&kept), "{kept} of 40 kept");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wiped_node_is_refused_under_its_old_identity() {
    let mut cluster = Cluster::start().await;
    let wiped = cluster.follower().await;
    let leader = cluster.node(cluster.leader().await);
    put(&leader, 1, "before").await;
    cluster.stop(wiped).await;
    fs::remove_dir_all(&cluster.configs[&wiped].directory).expect("wipe");
    cluster.restart(wiped).await;
    put(&leader, 2, "after").await;
    let refused = leader.add_voter(wiped, cluster.member(wiped)).await;
    match refused {
        Err(AddVoterError::Rejected { id, reason }) => {
            assert_eq!(id, wiped);
            assert!(reason.contains("wiped"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    let status = cluster.node(wiped).status();
    assert_eq!((status.last_log, status.leader), (None, None), "it was given nothing");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_node_never_comes_back_under_its_id_and_another_takes_its_place() {
    let mut cluster = Cluster::start_with(|config| config.snapshot_every = 10).await;
    let gone = cluster.follower().await;
    let other = *cluster.nodes.keys().find(|id| **id != gone).expect("another");
    let node = cluster.node(other);
    for _ in 0..2 {
        node.remove_voter(gone).await.expect("removed, and again without effect");
    }
    assert!(node.status().members.iter().all(|member| member.id != gone));
    cluster.stop(gone).await;
    let config = cluster.config(4);
    cluster.launch(config).await;
    node.add_voter(4, cluster.member(4)).await.expect("another takes its place");
    for number in 0..30 {
        put(&cluster.node(4), number, "x").await;
    }
    // The memory of it survives snapshots and a restart of all.
    for id in [1, 2, 3, 4].into_iter().filter(|id| *id != gone) {
        cluster.stop(id).await;
        cluster.restart(id).await;
    }
    fs::remove_dir_all(&cluster.configs[&gone].directory).expect("wipe");
    cluster.restart(gone).await;
    let refused = cluster.node(4).add_voter(gone, cluster.member(gone)).await;
    match refused {
        Err(AddVoterError::Rejected { reason, .. }) => {
            assert!(reason.contains("never used again"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_removes_itself_leaves_a_cluster_that_goes_on() {
    let mut cluster = Cluster::start().await;
    let leader = cluster.leader().await;
    cluster.node(leader).remove_voter(leader).await.expect("removed");
    cluster.stop(leader).await;
    let left = *cluster.nodes.keys().next().expect("two are left");
    put(&cluster.node(left), 1, "without it").await;
    assert_eq!(cluster.node(left).status().members.len(), 2);
    cluster.stop_all().await;
    let cluster = alone().await;
    let refused = cluster.node(1).remove_voter(1).await;
    assert!(matches!(refused, Err(RemoveVoterError::Rejected { .. })), "{refused:?}");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_becomes_a_new_cluster_that_the_old_ones_members_can_not_join() {
    let cluster = Cluster::start().await;
    for number in 0..20 {
        put(&cluster.node(1), number, "saved").await;
    }
    let backup = cluster.node(cluster.follower().await).backup().await.expect("backup");
    put(&cluster.node(1), 20, "after the backup").await;
    let info = read_backup(&backup).expect("read");
    assert_eq!((info.cluster_id, info.members.as_slice()), (CLUSTER, &[1, 2, 3][..]));

    let config = new_home(&cluster, 7);
    let member = Member { address: config.listen, name: "restored".to_owned() };
    let make = |cluster_id, backup| {
        let (directory, member) = (&*config.directory, member.clone());
        restore(Restore { directory, backup, cluster_id, node_id: 7, member })
    };
    assert!(matches!(make(CLUSTER, &backup), Err(OfflineError::SameCluster)));
    assert!(matches!(make(NEW_CLUSTER, &backup[..100]), Err(OfflineError::Backup(_))));
    let restored = make(NEW_CLUSTER, &backup).expect("restore");
    assert_eq!((restored.index, restored.old_cluster_id), (info.index, CLUSTER));
    assert!(matches!(make(NEW_CLUSTER, &backup), Err(OfflineError::NotEmpty { .. })));

    let node = start(config.clone()).await.expect("start");
    let view = node.read().await.expect("read");
    assert_eq!(view.values.len(), 20);
    put(&node, 100, "goes on").await;
    node.shutdown().await;
    let node = start(config.clone()).await.expect("start again");
    assert_eq!(node.read().await.expect("read").values.len(), 21);
    let old = Member { address: cluster.address(2), name: "old".to_owned() };
    let refused = node.add_voter(2, old).await;
    assert!(matches!(refused, Err(AddVoterError::Rejected { .. })), "{refused:?}");
    node.shutdown().await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_survivor_of_a_lost_quorum_goes_on_alone_and_says_what_is_uncertain() {
    let mut cluster = Cluster::start_with(|config| {
        config.snapshot_every = 15;
        config.keep_entries = 5;
    })
    .await;
    for number in 0..40 {
        put(&cluster.node(1), number, "x").await;
    }
    let survivor = cluster.follower().await;
    let in_use = recover_alone(RecoverAlone {
        from: &cluster.configs[&survivor].directory,
        into: &new_home(&cluster, survivor).directory,
        cluster_id: NEW_CLUSTER,
        member: cluster.member(survivor),
    });
    assert!(matches!(in_use, Err(OfflineError::Log(_))), "{in_use:?}");
    let expected = cluster.node(survivor).read().await.expect("read");
    for id in [1, 2, 3] {
        cluster.stop(id).await;
    }
    let config = new_home(&cluster, survivor);
    let recovered = recover_alone(RecoverAlone {
        from: &cluster.configs[&survivor].directory,
        into: &config.directory,
        cluster_id: NEW_CLUSTER,
        member: cluster.member(survivor),
    })
    .expect("recover");
    assert_eq!((recovered.node_id, recovered.old_cluster_id), (survivor, CLUSTER));
    assert!(recovered.last_log >= recovered.committed, "{recovered:?}");
    let looked = inspect(&config.directory).expect("inspect");
    assert_eq!((looked.cluster_id, looked.members.len()), (NEW_CLUSTER, 1));

    cluster.launch(config).await;
    let node = cluster.node(survivor);
    assert_eq!(node.read().await.expect("read").values, expected.values);
    put(&node, 1_000, "goes on").await;
    // The old directory is as it was.
    inspect(&cluster.directory.path().join(format!("node-{survivor}"))).expect("still there");
    cluster.stop_all().await;
}

/// A one-node cluster.
async fn alone() -> Cluster {
    let mut cluster = Cluster {
        authority: Authority::new(),
        nodes: Default::default(),
        configs: Default::default(),
        directory: tempfile::tempdir().expect("temporary directory"),
    };
    let config = cluster.config(1);
    cluster.launch(config).await;
    cluster.node(1).bootstrap(cluster.member(1)).await.expect("bootstrap");
    cluster
}

/// Settings of a node of the new cluster.
fn new_home(cluster: &Cluster, id: u64) -> Config {
    let mut config = cluster.config(id);
    config.cluster_id = NEW_CLUSTER;
    config.directory = cluster.directory.path().join(format!("new-{id}"));
    config.tls = cluster.authority.node(&NEW_CLUSTER, id);
    config.propose_deadline = PATIENCE;
    config
}

async fn start(config: Config) -> Result<Raft<Store>, StartError> {
    let echo = Arc::new(Echo(config.node_id));
    Raft::start(config, Store::default(), Arc::new(Unprepared), echo).await
}
