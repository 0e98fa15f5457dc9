//! What the API asks of the node it runs in.

use super::calls::{PeerAnswer, PeerCall};
use super::{Node, images};
use async_trait::async_trait;
use controller::api::{
    BodyStream, Cloud, CloudError, ProposeError, SubState, TokenKeys, Unavailable, UploadedImage,
};
use controller::ids::{HostId, ServerId};
use controller::plan::{Liveness, token_keys};
use controller::seal::Sealer;
use controller::state::compute::Server;
use controller::state::image::Image;
use controller::state::{Command, Outcome, RejectionKind, State, decode_result};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// How often a command is placed anew when others took the place it was given.
const PLACEMENTS_MAX: usize = 8;
/// How long another host may take for a console.
const CONSOLE_WITHIN: Duration = Duration::from_secs(10);
/// How long another host may take to say how far a start has come.
const SUB_STATE_WITHIN: Duration = Duration::from_secs(1);

/// The node as the API sees it.
pub(super) struct NodeCloud {
    node: Arc<Node>,
}

impl NodeCloud {
    /// For a node.
    pub(super) fn new(node: Arc<Node>) -> NodeCloud {
        NodeCloud { node }
    }

    async fn propose_once(
        &self,
        command_id: [u8; 16],
        command: &Command,
    ) -> Result<Outcome, ProposeError> {
        let unavailable = |error: String| ProposeError::Unavailable(error);
        let raft = self.node.raft().map_err(|error| unavailable(error.to_string()))?;
        let proposed = raft.propose(command_id, command.encode()).await;
        let proposed = proposed.map_err(|error| match error {
            raft::ProposeError::NoSpace(reason) => ProposeError::NoSpace(reason),
            error => unavailable(error.to_string()),
        })?;
        decode_result(&proposed.outcome)
            .map_err(|error| unavailable(error.to_string()))?
            .map_err(ProposeError::Rejected)
    }
}

/// Milliseconds since 1970.
pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[async_trait]
impl Cloud for NodeCloud {
    async fn read(&self) -> Result<State, Unavailable> {
        let raft = self.node.raft().map_err(|error| Unavailable(error.to_string()))?;
        let state = self.node.quorum.read(raft).await.map_err(Unavailable)?;
        let keys = self.node.keys.ready(&state.cluster.keys);
        keys.map_err(|lacking| Unavailable(lacking.to_string()))?;
        Ok(state)
    }

    async fn propose(
        &self,
        mut command_id: [u8; 16],
        command: Command,
    ) -> Result<Outcome, ProposeError> {
        for _ in 1..PLACEMENTS_MAX {
            match self.propose_once(command_id, &command).await {
                Err(ProposeError::Rejected(rejection))
                    if rejection.kind == RejectionKind::PlacementStale =>
                {
                    // The outcome is stored under its id: another try is another command.
                    command_id = *uuid::Uuid::new_v4().as_bytes();
                }
                result => return result,
            }
        }
        self.propose_once(command_id, &command).await
    }

    async fn console_output(
        &self,
        server: &Server,
        lines: Option<usize>,
    ) -> Result<String, CloudError> {
        let Some(host) = server.host else {
            return Err(CloudError::NotFound(format!("server {} has no console yet", server.id)));
        };
        let call = PeerCall::Console { server: server.id.clone() };
        let text = match self.node.call(host, &call, CONSOLE_WITHIN).await {
            Ok(PeerAnswer::Console(text)) => text,
            Ok(other) => return Err(CloudError::Failed(format!("host {host}: {other:?}"))),
            Err(error) => return Err(CloudError::Unavailable(format!("{error:#}"))),
        };
        Ok(lines.map_or(text.as_str(), |lines| last_lines(&text, lines)).to_owned())
    }

    async fn upload_image(
        &self,
        image: &Image,
        body: BodyStream,
    ) -> Result<UploadedImage, CloudError> {
        images::upload(&self.node, image, body).await
    }

    async fn download_image(&self, image: &Image) -> Result<BodyStream, CloudError> {
        images::download(&self.node, image).await
    }

    async fn volatile(&self, server: &ServerId) -> Option<SubState> {
        let host = self.node.raft().ok()?.view().compute.servers.get(server)?.host?;
        if host == self.node.host() {
            return self.node.agent().ok()?.sub_state(server);
        }
        let call = PeerCall::SubState { server: server.clone() };
        match self.node.call(host, &call, SUB_STATE_WITHIN).await {
            Ok(PeerAnswer::SubState(Some(word))) => sub_state(&word),
            _ => None,
        }
    }

    fn liveness(&self) -> Liveness {
        self.node.liveness().unwrap_or_default()
    }

    fn host(&self) -> HostId {
        self.node.host()
    }

    fn now_ms(&self) -> u64 {
        now_ms()
    }

    fn sealer(&self) -> &Sealer {
        self.node.keys.sealer()
    }

    fn token_keys(&self) -> TokenKeys {
        let first = self.node.keys.derived("tokens");
        match self.node.raft() {
            Ok(raft) => {
                let ring = &raft.view().cluster.token_keys;
                TokenKeys { keys: token_keys(ring, self.node.keys.sealer(), first) }
            }
            Err(_) => TokenKeys { keys: vec![first] },
        }
    }
}

fn sub_state(word: &str) -> Option<SubState> {
    [SubState::Networking, SubState::BlockDeviceMapping, SubState::Spawning]
        .into_iter()
        .find(|state| state.as_str() == word)
}

/// The last `count` lines; an unfinished last line counts as one.
fn last_lines(text: &str, count: usize) -> &str {
    if count == 0 {
        return "";
    }
    let body = text.strip_suffix('\n').unwrap_or(text);
    let start = body.rmatch_indices('\n').nth(count - 1).map_or(0, |(at, _)| at + 1);
    &text[start..]
}

#[cfg(test)]
mod tests {
    use super::last_lines;

    #[test]
    fn lines_are_counted_from_the_end() {
        assert_eq!(last_lines("a\nb\nc\n", 2), "b\nc\n");
        assert_eq!(last_lines("a\nb\nc", 1), "c");
        assert_eq!(last_lines("a\nb\n", 9), "a\nb\n");
        assert_eq!(last_lines("a\n", 0), "");
        assert_eq!(last_lines("", 3), "");
    }
}
