//! A member of the benchmark's cluster, as a process: the product's consensus, log, transport and
//! replicated state, without API, agent and guests.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use controller::plan::{Liveness, SharedInFlight};
use controller::state::cluster::{Capacity, ClusterCommand, HostAddresses, Init, NewHost};
use controller::state::{Command, FEATURE_LEVEL, decode_result};
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use crate::daemon::Machine;

/// Longest command that is taken.
const COMMAND_BYTES_MAX: usize = 64 << 10;
/// Answers that wait to be written on a connection.
const ANSWERS_MAX: usize = 1_024;
/// How long the others may take to be added.
const ADD_WITHIN: Duration = Duration::from_secs(60);

/// What a member is started with, in a file.
#[derive(Serialize, Deserialize)]
pub(super) struct MemberFile {
    pub(super) cluster_id: [u8; 16],
    pub(super) node_id: u64,
    pub(super) directory: PathBuf,
    pub(super) listen: SocketAddr,
    /// Where the load comes in.
    pub(super) load: SocketAddr,
    pub(super) ca: String,
    pub(super) certificate: String,
    pub(super) key: String,
    /// The first member makes the cluster and adds these.
    pub(super) others: Vec<(u64, SocketAddr)>,
}

type Raft = raft::Raft<Machine>;

/// Runs a member until it is killed.
pub(crate) async fn run(path: &std::path::Path) -> Result<()> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let file: MemberFile = serde_json::from_slice(&text)?;
    let prepare = Arc::new(Prepared { raft: OnceLock::new(), in_flight: Default::default() });
    let config = raft::Config {
        cluster_id: file.cluster_id,
        node_id: file.node_id,
        directory: file.directory.clone(),
        listen: file.listen,
        tls: raft::Tls {
            ca: file.ca.clone(),
            cert: file.certificate.clone(),
            key: file.key.clone(),
        },
        ..raft::Config::default()
    };
    let raft = Raft::start(config, Machine::default(), prepare.clone(), Arc::new(NoCalls)).await?;
    prepare.raft.set(raft.clone()).map_err(|_| anyhow!("started twice"))?;
    let listener = TcpListener::bind(file.load).await?;
    if !file.others.is_empty() {
        make_cluster(&raft, &file).await?;
    }
    println!("ready");
    loop {
        let (stream, _) = listener.accept().await?;
        let raft = raft.clone();
        tokio::spawn(async move {
            if let Err(error) = connection(stream, raft).await {
                tracing::debug!(%error, "a connection broke");
            }
        });
    }
}

async fn make_cluster(raft: &Raft, file: &MemberFile) -> Result<()> {
    let member = |id: u64, address| raft::Member { address, name: format!("node{id}") };
    raft.bootstrap(member(file.node_id, file.listen)).await?;
    for (id, address) in &file.others {
        tokio::time::timeout(ADD_WITHIN, raft.add_voter(*id, member(*id, *address))).await??;
    }
    let init = Command::Cluster(ClusterCommand::Init(Box::new(Init {
        cluster_id: uuid::Uuid::from_bytes(file.cluster_id).to_string(),
        name: "bench".into(),
        region: "RegionOne".into(),
        host: NewHost {
            name: "node1".into(),
            addresses: addresses(file.listen),
            capacity: Capacity { vcpus: 1, ram_mib: 1, disk_gib: 1 },
            feature_level: FEATURE_LEVEL,
        },
        admin_name: "admin".into(),
        admin_password_hash: "$argon2id$none".into(),
        floating_pool: "127.77.1.0/24".parse()?,
        feature_level: FEATURE_LEVEL,
    })));
    let made = raft.propose(rand::random(), init.encode()).await?;
    match decode_result(&made.outcome)? {
        Ok(_) => Ok(()),
        Err(rejection) => bail!("{rejection}"),
    }
}

fn addresses(at: SocketAddr) -> HostAddresses {
    HostAddresses { api: at, raft: at, storage: at, tunnel: at, server_name: "bench".into() }
}

/// A write of the product: a host says where it is reached and what it has.
pub(super) fn command(at: SocketAddr, number: u64) -> Vec<u8> {
    let capacity = Capacity { vcpus: 1, ram_mib: number, disk_gib: 1 };
    let update = ClusterCommand::UpdateHost {
        id: controller::ids::HostId(1),
        addresses: addresses(at),
        capacity,
        feature_level: FEATURE_LEVEL,
    };
    Command::Cluster(update).encode()
}

/// What the node does with each command on the leader.
struct Prepared {
    raft: OnceLock<Raft>,
    in_flight: SharedInFlight,
}

impl raft::Prepare for Prepared {
    fn prepare(&self, bytes: Vec<u8>) -> raft::Prepared {
        let (Ok(mut command), Some(raft)) = (Command::decode(&bytes), self.raft.get()) else {
            return raft::Prepared::bare(bytes);
        };
        let up = Liveness { up: Default::default() };
        let (changed, promise) =
            controller::plan::prepare_held(&raft.view(), &up, &self.in_flight, &mut command);
        let command = if changed { command.encode() } else { bytes };
        raft::Prepared { command, held: promise.map(|promise| Box::new(promise) as _) }
    }
}

struct NoCalls;

impl raft::Calls for NoCalls {
    fn call(&self, _peer: raft::NodeId, _request: Vec<u8>) -> BoxFuture<'static, Vec<u8>> {
        Box::pin(async { Vec::new() })
    }
}

/// Requests: length, writer (both 32 bits), command. Answers: writer.
async fn connection(stream: TcpStream, raft: Raft) -> Result<()> {
    stream.set_nodelay(true)?;
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::with_capacity(64 << 10, reader);
    let (answers, mut answered) = mpsc::channel::<u32>(ANSWERS_MAX);
    tokio::spawn(async move {
        let mut batch = Vec::new();
        while answered.recv_many(&mut batch, ANSWERS_MAX).await > 0 {
            let bytes: Vec<u8> = batch.drain(..).flat_map(u32::to_be_bytes).collect();
            if writer.write_all(&bytes).await.is_err() {
                return;
            }
        }
    });
    loop {
        let length = reader.read_u32().await? as usize;
        if length > COMMAND_BYTES_MAX {
            bail!("a command of {length} bytes; at most {COMMAND_BYTES_MAX} are taken");
        }
        let number = reader.read_u32().await?;
        let mut command = vec![0; length];
        reader.read_exact(&mut command).await?;
        let (raft, answers) = (raft.clone(), answers.clone());
        tokio::spawn(async move {
            match raft.propose(rand::random(), command).await {
                Ok(proposed) if matches!(decode_result(&proposed.outcome), Ok(Ok(_))) => {
                    let _ = answers.send(number).await;
                }
                Ok(_) => tracing::error!("a command of the benchmark was rejected"),
                Err(error) => tracing::error!(%error, "a command was not committed"),
            }
        });
    }
}
