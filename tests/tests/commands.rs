//! The commands a user types before there is a cloud, and what they refuse.

use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Result, ensure};
use tests::trine;

fn run(arguments: &[&str], data: &Path) -> Result<Output> {
    Ok(Command::new(trine()).args(arguments).arg("--data-dir").arg(data).output()?)
}

fn message(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn init_refuses_a_data_directory_that_is_taken() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let data = directory.path().join("node1");
    let init = ["init", "--address", "127.0.0.1", "--name", "node1"];
    let first = run(&init, &data)?;
    ensure!(first.status.success(), "{}", message(&first));
    let authority = std::fs::read(data.join("node.toml"))?;

    let second = run(&init, &data)?;
    ensure!(!second.status.success(), "a second init must not succeed");
    ensure!(message(&second).contains(&data.display().to_string()), "{}", message(&second));
    ensure!(std::fs::read(data.join("node.toml"))? == authority, "the first cluster was changed");
    Ok(())
}

#[test]
fn node_names_the_port_that_is_taken() -> Result<()> {
    if !tests::kvm_opens("node_names_the_port_that_is_taken") {
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let data = directory.path().join("node1");
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = taken.local_addr()?.port().to_string();
    let init = ["init", "--address", "127.0.0.1", "--name", "node1", "--api-port", &port];
    let made = run(&init, &data)?;
    ensure!(made.status.success(), "{}", message(&made));

    let node = run(&["node"], &data)?;
    let said = message(&node);
    ensure!(!node.status.success(), "it must not start");
    ensure!(said.contains(&port), "the message does not name port {port}: {said}");
    let _ = run(&["stop", "--guests"], &data)?;
    Ok(())
}

#[test]
fn node_says_who_may_open_kvm_where_it_may_not() -> Result<()> {
    let root = Command::new("id").arg("-u").output()?.stdout == b"0\n";
    if !root {
        eprintln!("SKIPPED node_says_who_may_open_kvm_where_it_may_not: it hides /dev/kvm as root");
        return Ok(());
    }
    let directory = tempfile::tempdir()?;
    let data = directory.path().join("node1");
    let init = run(&["init", "--address", "127.0.0.1", "--name", "node1"], &data)?;
    ensure!(init.status.success(), "{}", message(&init));
    // A mount namespace of its own in which /dev/kvm is an ordinary empty file.
    let script = "mount --bind \"$1\" /dev/kvm 2>/dev/null || mount -t tmpfs none /dev; exec \"$2\" node --data-dir \"$3\"";
    let empty = directory.path().join("empty");
    std::fs::write(&empty, "")?;
    let node = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, "sh"])
        .arg(&empty)
        .arg(trine())
        .arg(&data)
        .output()?;
    let said = message(&node);
    ensure!(!node.status.success(), "it must not start");
    ensure!(said.contains("/dev/kvm"), "{said}");
    Ok(())
}
