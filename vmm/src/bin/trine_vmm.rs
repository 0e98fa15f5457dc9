//! `trine-vmm`: one guest (`run`), or the process that starts guests (`spawner`).

use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "\
trine-vmm: a virtual machine monitor, one guest in one process

Usage:
  trine-vmm run --config FILE   run the guest that FILE describes; its exit code is the guest's
  trine-vmm --help              this text

A configuration (JSON; every path is opened before the sandbox closes):
{
  \"version\": 1,
  \"id\": \"demo\",
  \"memory_mib\": 128,
  \"boot\": { \"kernel\": { \"path\": \"guest.elf\" }, \"cmdline\": \"\" },
  \"disks\": [ { \"id\": \"root\", \"source\": { \"raw\": { \"path\": \"disk.img\" } }, \"serial\": \"root\" } ],
  \"nets\": [ { \"id\": \"eth0\", \"mac\": \"fa:16:3e:00:00:01\", \"backend\": { \"tap\": { \"path\": \"tap0\" } } } ],
  \"control\": { \"path\": \"/run/demo.sock\" }
}
Console output goes to standard output unless \"console\": { \"file\": { \"path\": FILE } } is given.
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["run", "--config", file] => {
            let problems = vmm::process::standalone::run(Path::new(file));
            fail(&problems)
        }
        ["--help" | "-h" | "help"] => {
            print!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => fail(&["unknown arguments; see trine-vmm --help".into()]),
    }
}

fn fail(problems: &[String]) -> ExitCode {
    for problem in problems {
        eprintln!("trine-vmm: {problem}");
    }
    ExitCode::from(2)
}
