from kvrewrite.cli import main

main()
