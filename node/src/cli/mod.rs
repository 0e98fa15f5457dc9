//! The subcommands of an operator, one file each.

pub(crate) mod cluster;
pub(crate) mod init;
pub(crate) mod join;
pub(crate) mod join_token;
pub(crate) mod logging;
pub(crate) mod node;
pub(crate) mod status;
pub(crate) mod stop;
pub(crate) mod storage;
pub(crate) mod switch;
pub(crate) mod vmm;

use crate::config::NodeConfig;
use std::net::IpAddr;

/// What `init` and `join` ask about this host.
#[derive(clap::Args)]
pub(crate) struct HostArgs {
    /// The address everything of this host binds to and others reach it at.
    #[arg(long)]
    pub(crate) address: IpAddr,
    /// The host's name (default: this machine's host name).
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// TCP port of the API.
    #[arg(long, default_value_t = 8774)]
    pub(crate) api_port: u16,
    /// TCP port for the other nodes' consensus traffic.
    #[arg(long, default_value_t = 8775)]
    pub(crate) raft_port: u16,
    /// TCP port on which other hosts reach this host's volumes and images.
    #[arg(long, default_value_t = 8776)]
    pub(crate) storage_port: u16,
    /// UDP port of the VXLAN tunnels.
    #[arg(long, default_value_t = 4789)]
    pub(crate) vxlan_port: u16,
}

impl HostArgs {
    /// A configuration with what was said, to be given a node and a cluster.
    pub(crate) fn config(&self) -> NodeConfig {
        NodeConfig {
            node_id: 1,
            cluster_id: String::new(),
            name: self.name(),
            address: self.address,
            api_port: self.api_port,
            raft_port: self.raft_port,
            storage_port: self.storage_port,
            vxlan_port: self.vxlan_port,
            public_url: None,
            vcpus: 0,
            ram_mib: 0,
            reserved_ram_mib: 1024,
            disk_gib: 0,
        }
    }

    /// The name given, else the machine's.
    pub(crate) fn name(&self) -> String {
        self.name
            .clone()
            .unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned())
    }
}
