//! Three hosts on a wire, and on them a cloud made with the commands that a user gives.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use reqwest::Method;
use serde_json::{Value, json};

use super::HOSTS;
use super::api::{Api, Credentials, id};
use super::host::{self, Host};
use super::registers::{Field, INITIAL};
use super::seat::Seat;
use super::wire::Wire;

/// How long the making of the cloud may take, step by step.
const PATIENCE: Duration = Duration::from_secs(120);

/// What servers are made with.
#[derive(Clone, Debug)]
pub(super) struct Made {
    pub(super) project: String,
    pub(super) image: String,
    pub(super) flavor: String,
    pub(super) network: String,
}

/// Hosts and wire. What is made here goes with the value.
pub(super) struct Ground {
    pub(super) hosts: Vec<Host>,
    pub(super) wire: Wire,
    pub(super) directory: PathBuf,
    sweeper: Sweeper,
    keep: bool,
}

/// Removes the directory of a run that ended without doing so (Ctrl-C, kill -9): it waits for the
/// end of a pipe that this process holds.
struct Sweeper {
    process: Child,
    pipe: Option<ChildStdin>,
}

impl Sweeper {
    fn start(directory: &Path) -> Result<Sweeper> {
        let script = "read -r word; test \"$word\" = keep || rm -rf \"$1\"";
        let mut process = Command::new("sh")
            .args(["-c", script, "sh"])
            .arg(directory)
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let pipe = process.stdin.take();
        Ok(Sweeper { process, pipe })
    }

    fn end(&mut self, word: &str) {
        if let Some(mut pipe) = self.pipe.take() {
            let _ = writeln!(pipe, "{word}");
        }
        let _ = self.process.wait();
    }
}

/// What this machine lacks, in words.
pub(super) fn lacks() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("hosts are namespaces with disks: run it as root".into());
    }
    for device in ["/dev/kvm", "/dev/net/tun", "/dev/loop-control"] {
        if let Err(error) = std::fs::File::options().read(true).write(true).open(device) {
            return Some(format!("{device} does not open: {error}"));
        }
    }
    for (program, package) in [
        ("unshare", "util-linux"),
        ("nsenter", "util-linux"),
        ("ip", "iproute2"),
        ("mkfs.ext4", "e2fsprogs"),
    ] {
        let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output();
        if !found.is_ok_and(|found| found.status.success()) {
            return Some(format!("{program} is missing; apt-get install {package}"));
        }
    }
    None
}

impl Ground {
    /// Makes three hosts on a wire.
    pub(super) fn make(trine: &Path, seed: u64) -> Result<Ground> {
        let directory = std::env::temp_dir().join(format!("trine-torture-{}", std::process::id()));
        std::fs::create_dir(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        let sweeper = Sweeper::start(&directory)?;
        let trine = trine.canonicalize()?;
        let hosts = (1..=HOSTS).map(|number| Host::make(&trine, &directory, number));
        let hosts = hosts.collect::<Result<Vec<Host>>>()?;
        let wire = Wire::join([hosts[0].first, hosts[1].first, hosts[2].first], seed)?;
        hosts.iter().try_for_each(Host::connect)?;
        Ok(Ground { hosts, wire, directory, sweeper, keep: false })
    }

    /// Leaves logs and disks for a look.
    pub(super) fn keep(&mut self) {
        self.keep = true;
    }

    /// `trine init`, `node`, `join-token`, `join`, as in the README.
    pub(super) fn make_cluster(&mut self) -> Result<()> {
        let (first, others) = self.hosts.split_first_mut().context("there are three")?;
        let address = first.address.to_string();
        first.trine(&["init", "--name", &first.name, "--address", &address], None)?;
        first.start_node()?;
        for host in others {
            let token = patiently(|| first.trine(&["join-token"], None))?;
            let address = host.address.to_string();
            let join = ["join", "--name", &host.name, "--address", &address, "--token-file", "-"];
            host.trine(&join, Some(&token))?;
            host.start_node()?;
        }
        Ok(())
    }

    /// Takes a seat at each node and signs in.
    pub(super) fn seats(&self) -> Result<Vec<Seat>> {
        let file: Value =
            serde_json::from_slice(&std::fs::read(self.hosts[0].data("credentials.json"))?)?;
        let authority = std::fs::read(self.hosts[0].data("ca.pem"))?;
        let credentials = Arc::new(Credentials { file, authority });
        let mut seats = Vec::new();
        for host in &self.hosts {
            let seat = Seat::take(host.first, Api::new(host.address, &credentials)?)?;
            seat.get_patiently("/compute/v2.1/flavors".into(), PATIENCE)
                .with_context(|| format!("the node of {} does not serve", host.name))?;
            seats.push(seat);
        }
        Ok(seats)
    }

    /// Puts image, flavor and network into the catalog.
    pub(super) fn make_catalog(&self, trine: &Path, seat: &Seat) -> Result<Made> {
        let file = self.directory.join("guest.img");
        host::run(Command::new(trine).args(["image", "export"]).arg(&file))?;
        let content = std::fs::read(&file)?;
        let api = seat.api.clone();
        seat.run(async move {
            let project = api.sign_in().await?["token"]["project"]["id"].clone();
            let project = project.as_str().context("a project's id")?.to_owned();
            raise_quotas(&api, &project).await?;
            let image = api.image("guest", content).await?;
            let flavor = json!({"flavor": {"name": "tiny", "ram": 64, "vcpus": 1, "disk": 0}});
            let flavor = id(&api.post("/compute/v2.1/flavors", flavor).await?)?;
            let network = json!({"network": {"name": INITIAL}});
            let network = id(&api.post("/networking/v2.0/networks", network).await?)?;
            let subnet = json!({"subnet": {
                "network_id": network, "ip_version": 4, "cidr": "10.30.0.0/16",
            }});
            api.post("/networking/v2.0/subnets", subnet).await?;
            Ok(Made { project, image, flavor, network })
        })
    }

    /// Waits until every host is a voter and up.
    pub(super) fn wait_for_voters(&self) -> Result<()> {
        patiently(|| {
            let status = self.hosts[0].status()?;
            let hosts = status["hosts"].as_array().context("hosts")?;
            let ready = |host: &&Value| host["voter"] == true && host["up"] == true;
            let count = hosts.iter().filter(ready).count();
            ensure!(count == HOSTS, "{count} of {HOSTS} hosts are voters and up: {status}");
            Ok(())
        })
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // The hosts first: they hold mounts of what lies in the directory.
        self.hosts.clear();
        if self.keep || std::thread::panicking() {
            eprintln!("kept for a look: {}", self.directory.display());
            self.sweeper.end("keep");
        } else {
            self.sweeper.end("remove");
        }
    }
}

/// Lost creations are not counted by their clients: quotas shall not end the run.
async fn raise_quotas(api: &Api, project: &str) -> Result<()> {
    let path = format!("/compute/v2.1/os-quota-sets/{project}");
    let quotas = json!({"quota_set": {"instances": -1, "cores": -1, "ram": -1}});
    api.must(Method::PUT, &path, Some(&quotas)).await.map(drop)
}

/// Fields that the clients overwrite: of two projects, of the network, a volume and a server.
pub(super) fn make_fields(
    seat: &Seat,
    made: &Made,
    server: &str,
    volume: &str,
) -> Result<Vec<Field>> {
    let api = seat.api.clone();
    let mut fields = seat.run(async move {
        let mut fields = Vec::new();
        for name in ["project-one", "project-two"] {
            let body = json!({"project": {"name": name, "description": INITIAL}});
            let project = id(&api.post("/identity/v3/projects", body).await?)?;
            let path = format!("/identity/v3/projects/{project}");
            let pointer: &[&str] = &["project", "description"];
            fields.push(Field { name, method: Method::PATCH, path, pointer });
        }
        Ok(fields)
    })?;
    let mut put = |name, path, pointer| {
        fields.push(Field { name, method: Method::PUT, path, pointer });
    };
    put("network", format!("/networking/v2.0/networks/{}", made.network), &["network", "name"]);
    let volume = format!("/volume/v3/{}/volumes/{volume}", made.project);
    put("volume", volume, &["volume", "description"]);
    put("server", format!("/compute/v2.1/servers/{server}"), &["server", "description"]);
    Ok(fields)
}

/// Does something again until it works.
fn patiently<T>(mut act: impl FnMut() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match act() {
            Err(error) if start.elapsed() > PATIENCE => {
                bail!("still after {} s: {error:#}", PATIENCE.as_secs())
            }
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
            done => return done,
        }
    }
}
