//! `trine bench restart`: from a node's start to its serving, with a state of many objects.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use controller::ids::{HostId, UserId};
use controller::state::cluster::{Capacity, ClusterCommand, HostAddresses, NewHost};
use controller::state::compute::Placement;
use controller::state::identity::{IdentityCommand, NewUser};
use controller::state::image::{ImageCommand, NewImage, Visibility};
use controller::state::network::{NetworkCommand, NewNetwork};
use controller::state::volume::{NewVolume, VolumeCommand};
use controller::state::{Command, decode_result};
use futures::future::BoxFuture;
use tokio::task::JoinSet;

use super::{Figures, Series};
use crate::client::{Client, Service};
use crate::cluster::{Addresses, Cluster};
use crate::config::NodeConfig;
use crate::daemon::Machine;
use crate::data_directory::DataDirectory;

/// Commands under way while the state is made.
const IN_FLIGHT: usize = 512;
/// Most objects: each kind has a limit in the state.
const OBJECTS_MAX: usize = 300_000;

const METHOD: &str = "One node with its own log and snapshots; it is killed (SIGKILL) and started. \
    ready: from before the process is spawned to its line `trine node ready` (it leads and has \
    applied its log). first-answer: to the answer of the first request of a client through the API. \
    The objects are users, images, networks and volumes in equal parts, made by the product's own \
    commands; the volumes lie on another host.";

/// Measures in a cluster of its own.
pub(crate) async fn restart(objects: usize, restarts: usize) -> Result<Figures> {
    ensure!(restarts > 0, "--restarts is 0; at least one must be measured");
    ensure!(objects <= OBJECTS_MAX, "--objects must be at most {OBJECTS_MAX}");
    let directory = tempfile::Builder::new().prefix("trine-bench-").tempdir()?;
    let addresses = Addresses::of_process(std::process::id());
    let mut cluster = Cluster::at(directory.path(), addresses)?;
    let measured = tokio::select! {
        measured = measure(&mut cluster, addresses, objects, restarts) => measured,
        signal = tokio::signal::ctrl_c() => { signal?; Err(anyhow!("interrupted")) }
    };
    cluster.end().await?;
    measured
}

async fn measure(
    cluster: &mut Cluster,
    addresses: Addresses,
    objects: usize,
    restarts: usize,
) -> Result<Figures> {
    cluster.make_first(addresses).await?;
    cluster.member_mut(0).terminate().await?;
    eprintln!("making {objects} objects");
    fill(&cluster.members()[0].data_directory, objects).await?;
    cluster.member_mut(0).start().await?;
    let client = cluster.client().await?;
    let (mut ready_ms, mut answer_ms) = (Vec::new(), Vec::new());
    for _ in 0..restarts {
        cluster.member_mut(0).kill().await?;
        let start = Instant::now();
        cluster.member_mut(0).start().await?;
        ready_ms.push(start.elapsed().as_secs_f64() * 1e3);
        first_answer(&client).await?;
        answer_ms.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let series =
        [Series::new("ready", "ms", ready_ms), Series::new("first-answer", "ms", answer_ms)];
    Ok(Figures {
        bench: "restart".into(),
        method: format!("{METHOD} {objects} objects."),
        series: series.into_iter().flatten().collect(),
        failures: 0,
    })
}

async fn first_answer(client: &Client) -> Result<()> {
    // The first may use a connection that ended with the killed process.
    if client.get(Service::Compute, "flavors").await.is_err() {
        client.get(Service::Compute, "flavors").await?;
    }
    Ok(())
}

/// Opens the stopped node's log and state and adds objects to them.
async fn fill(data_directory: &Path, objects: usize) -> Result<()> {
    let directory = DataDirectory::open(data_directory)?;
    let config = NodeConfig::read(directory.root())?;
    let secrets = directory.secrets(&config.cluster_id)?;
    let settings = raft::Config {
        cluster_id: config.cluster_bytes(),
        node_id: config.node_id,
        directory: directory.join("raft"),
        listen: config.raft(),
        tls: raft::Tls {
            ca: secrets.authority.certificate_pem.clone(),
            cert: secrets.certificate_pem.clone(),
            key: secrets.key_pem.clone(),
        },
        ..raft::Config::default()
    };
    let prepare = Arc::new(raft::Unprepared);
    let raft = raft::Raft::start(settings, Machine::default(), prepare, Arc::new(NoCalls)).await?;
    let filled = fill_with(&raft, objects).await;
    raft.shutdown().await;
    filled
}

async fn fill_with(raft: &raft::Raft<Machine>, objects: usize) -> Result<()> {
    let state = raft.read().await?;
    let project = state.identity.projects.keys().next().context("the cluster has no project")?;
    let user = state.identity.users.keys().next().context("the cluster has no user")?;
    let (project, user) = (project.clone(), user.clone());
    for command in far_host() {
        propose(raft.clone(), command).await?;
    }
    let mut under_way = JoinSet::new();
    for number in 0..objects {
        if under_way.len() >= IN_FLIGHT {
            under_way.join_next().await.context("some are under way")???;
        }
        let command = object(number, &project, &user);
        under_way.spawn(propose(raft.clone(), command));
    }
    while let Some(done) = under_way.join_next().await {
        done??;
    }
    Ok(())
}

async fn propose(raft: raft::Raft<Machine>, command: Command) -> Result<()> {
    let proposed = raft.propose(rand::random(), command.encode()).await?;
    match decode_result(&proposed.outcome)? {
        Ok(_) => Ok(()),
        Err(rejection) => bail!("the state refused an object: {rejection}"),
    }
}

/// A second host, which never runs, so that nobody does anything about the volumes.
fn far_host() -> [Command; 2] {
    let at = std::net::SocketAddr::from(([127, 255, 255, 254], 9));
    let hash = "bench".to_owned();
    let host = NewHost {
        name: "far".into(),
        addresses: HostAddresses {
            api: at,
            raft: at,
            storage: at,
            tunnel: at,
            server_name: "far".into(),
        },
        capacity: Capacity { vcpus: 1, ram_mib: 1, disk_gib: 1 << 30 },
        feature_level: controller::state::FEATURE_LEVEL,
    };
    let issue =
        ClusterCommand::IssueJoinToken { hash: hash.clone(), expires_ms: u64::MAX, replaces: None };
    let register = ClusterCommand::RegisterHost { token_hash: hash, host: Box::new(host) };
    [Command::Cluster(issue), Command::Cluster(register)]
}

fn object(number: usize, project: &controller::ids::ProjectId, user: &UserId) -> Command {
    let id = uuid::Uuid::new_v4();
    let name = format!("bench-{number}");
    match number % 4 {
        0 => Command::Identity(IdentityCommand::CreateUser(NewUser {
            id: UserId::from(id.simple().to_string()),
            domain_id: "default".into(),
            name,
            password_hash: None,
            enabled: true,
            default_project_id: Some(project.clone()),
            email: None,
            description: None,
        })),
        1 => Command::Image(ImageCommand::Create(Box::new(NewImage {
            id: id.into(),
            name: Some(name),
            owner: Some(project.clone()),
            disk_format: Some("raw".into()),
            container_format: Some("bare".into()),
            visibility: Visibility::Public,
            protected: false,
            hidden: false,
            min_disk: 0,
            min_ram: 0,
            tags: Default::default(),
            properties: BTreeMap::from([("os_type".into(), "linux".into())]),
        }))),
        2 => Command::Network(NetworkCommand::CreateNetwork(Box::new(NewNetwork {
            id: id.into(),
            project_id: project.clone(),
            name,
            description: String::new(),
            admin_state_up: true,
            shared: false,
            external: false,
            port_security_enabled: true,
            mtu: None,
            tags: Default::default(),
        }))),
        _ => Command::Volume(VolumeCommand::Create(Box::new(NewVolume {
            id: id.into(),
            name,
            description: None,
            project_id: project.clone(),
            user_id: user.clone(),
            size_gib: 1,
            metadata: BTreeMap::new(),
            availability_zone: None,
            placement: Some(Placement::Host(HostId(2))),
        }))),
    }
}

struct NoCalls;

impl raft::Calls for NoCalls {
    fn call(&self, _peer: raft::NodeId, _request: Vec<u8>) -> BoxFuture<'static, Vec<u8>> {
        Box::pin(async { Vec::new() })
    }
}
