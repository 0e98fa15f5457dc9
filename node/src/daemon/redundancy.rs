//! Images on at least two hosts: the leader looks which image has fewer living holders, and has one
//! more host fetch it. After an upload, and after a host is gone for good.

use super::Node;
use super::calls::PeerCall;
use anyhow::{Context, Result, bail};
use controller::ids::{HostId, ImageId};
use controller::state::cluster::Host;
use controller::state::image::ImageCommand;
use controller::state::{Command, State, decode_result};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use storage::control::Peer;

/// Living hosts that shall hold an image.
const HOLDERS: usize = 2;
/// How often the leader looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long another host may take to fetch a copy.
const COPY_WITHIN: Duration = Duration::from_secs(30 * 60);
/// Pause after a copy that failed.
const RETRY_AFTER: Duration = Duration::from_secs(10);
/// Images whose failure is remembered.
const FAILED_MAX: usize = 1_000;

/// Looks until the node ends; one copy at a time.
pub(super) async fn run(node: Arc<Node>) {
    let mut failed: BTreeMap<ImageId, Instant> = BTreeMap::new();
    let mut seen = None;
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let Ok(raft) = node.raft() else { continue };
        if !raft.is_leader() {
            seen = None;
            continue;
        }
        let (state, up) = (raft.view(), node.liveness().unwrap_or_default().up);
        failed.retain(|_, at| at.elapsed() < RETRY_AFTER);
        // Many images and nothing new is the usual case.
        let now = (*raft.applied().borrow(), up.clone());
        if failed.is_empty() && seen.as_ref() == Some(&now) {
            continue;
        }
        let missing = missing(&state, &up, |image| failed.contains_key(image));
        if missing.is_empty() {
            seen = Some(now);
        }
        for copy in missing {
            let image = copy.image.clone();
            if let Err(error) = perform(&node, copy).await {
                tracing::warn!(image_id = %image, "no second copy of the image: {error:#}");
                if failed.len() < FAILED_MAX {
                    failed.insert(image, Instant::now());
                }
            }
        }
    }
}

/// A copy to be made.
#[derive(Debug, PartialEq, Eq)]
struct Copy {
    image: ImageId,
    from: BTreeSet<HostId>,
    to: HostId,
}

/// Pure: the copies that are missing, each to the host that is up and has the fewest images.
fn missing(state: &State, up: &BTreeSet<HostId>, skip: impl Fn(&ImageId) -> bool) -> Vec<Copy> {
    // A host that is silent for a moment comes back with its images; one that is dead to the cluster
    // does not.
    let dead = |id: &HostId| {
        let host = state.cluster.hosts.get(id);
        host.is_none_or(Host::is_out)
    };
    let mut held: BTreeMap<HostId, usize> = up.iter().map(|host| (*host, 0)).collect();
    let images = || state.image.images.values().filter(|image| image.content.is_some());
    for host in images().flat_map(|image| &image.hosts) {
        held.entry(*host).and_modify(|count| *count += 1);
    }
    let mut copies = Vec::new();
    for image in images().filter(|image| !skip(&image.id)) {
        let from = &image.hosts & up;
        let kept = image.hosts.iter().filter(|host| !dead(host)).count();
        if from.is_empty() || kept >= HOLDERS {
            continue;
        }
        let others = held.iter_mut().filter(|(host, _)| !image.hosts.contains(host));
        if let Some((to, count)) = others.min_by_key(|(host, count)| (**count, **host)) {
            *count += 1;
            copies.push(Copy { image: image.id.clone(), from, to: *to });
        }
    }
    copies
}

async fn perform(node: &Node, copy: Copy) -> Result<()> {
    let state = node.raft()?.view();
    let image = state.image.images.get(&copy.image);
    let Some(content) = image.and_then(|image| image.content.clone()) else { return Ok(()) };
    let from: Vec<Peer> = copy
        .from
        .iter()
        .filter_map(|host| Some(&state.cluster.hosts.get(host)?.addresses))
        .map(|at| Peer { address: at.storage, server_name: at.server_name.clone() })
        .collect();
    let call =
        PeerCall::FetchImage { sha512: content.sha512, size_bytes: content.size_bytes, from };
    node.call(copy.to, &call, COPY_WITHIN).await?;
    let held = Command::Image(ImageCommand::HeldBy { id: copy.image, host: copy.to });
    let id = *uuid::Uuid::new_v4().as_bytes();
    let proposed = node.raft()?.propose(id, held.encode()).await?;
    match decode_result(&proposed.outcome).context("an outcome can't be read")? {
        Ok(_) => Ok(()),
        Err(rejection) => bail!("{rejection}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use controller::state::image::{Image, ImageContent, ImageStatus, Visibility};

    fn image(id: &str, hosts: &[u64], has_content: bool) -> Image {
        let content = ImageContent {
            size_bytes: 1,
            virtual_size_bytes: 1,
            md5: String::new(),
            sha512: "ab".into(),
            kind: "elf".into(),
        };
        Image {
            id: id.into(),
            name: None,
            owner: None,
            status: ImageStatus::Active,
            disk_format: None,
            container_format: None,
            visibility: Visibility::Public,
            protected: false,
            hidden: false,
            min_disk: 0,
            min_ram: 0,
            tags: Default::default(),
            properties: Default::default(),
            content: has_content.then_some(content),
            hosts: hosts.iter().map(|id| HostId(*id)).collect(),
            created_ms: 0,
            updated_ms: 0,
            upload: Default::default(),
            uploader: None,
        }
    }

    #[test]
    fn an_image_with_one_living_holder_goes_to_the_host_with_the_fewest() {
        let mut state = State::default();
        for id in [1, 2, 3, 4, 9] {
            let mut host = super::super::tests::host(id);
            host.forced_down = id == 9;
            state.cluster.hosts.insert(HostId(id), host);
        }
        for image in [
            image("enough", &[1, 2], true),
            image("holder-is-silent", &[1, 4], true),
            image("alone", &[2, 9], true),
            image("lost", &[9], true),
            image("of-removed", &[8], true),
            image("empty", &[], false),
            image("failed", &[1], true),
        ] {
            state.image.images.insert(image.id.clone(), Arc::new(image));
        }
        let up = [1, 2, 3].map(HostId).into();
        let copies = missing(&state, &up, |id| id.as_str() == "failed");
        let expected = Copy { image: "alone".into(), from: [HostId(2)].into(), to: HostId(3) };
        assert_eq!(copies, [expected]);
        assert_eq!(missing(&state, &[HostId(2)].into(), |_| false), []);
    }
}
