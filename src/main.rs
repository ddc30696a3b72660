//! Entry point.

fn main() -> std::process::ExitCode {
    heaptap::cli::main()
}
